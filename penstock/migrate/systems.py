"""The systems whose configurations can be read, by name."""

from penstock.migrate.accelerate import ACCELERATE
from penstock.migrate.cerebras import CEREBRAS
from penstock.migrate.deepspeed import DEEPSPEED
from penstock.migrate.graphcore import GRAPHCORE
from penstock.migrate.habana import HABANA
from penstock.migrate.sambanova import SAMBANOVA

SYSTEMS = {
    system.name: system
    for system in (SAMBANOVA, CEREBRAS, GRAPHCORE, HABANA, DEEPSPEED, ACCELERATE)
}
