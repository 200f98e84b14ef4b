"""The command line: verbs and flags to `api` calls, errors to exit codes. No logic of its own."""

import argparse
import difflib
import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from penstock import __version__
from penstock.config.keys import all_keys
from penstock.config.load import LoadedConfig, load_config
from penstock.config.reference import VERBS, verb_help
from penstock.console import Console, set_console
from penstock.errors import UserError
from penstock.hardware.process import prepare_process
from penstock.parallel.environment import (
    end_with_launcher,
    find_place,
    leave_error,
    was_launched,
)
from penstock.parallel.hosts import host_keys, launch_on_hosts, read_hosts

_FILE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""System errors the user can mend: full or read-only disks, missing permissions."""
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")
"""What torch's allocators and the system say when there is no more."""

_FLAGS_WITH_VALUES = (
    "--config",
    "--trust",
    "--from",
    "--processes",
    "--hosts",
    "--benchmark",
    "--compare",
)


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage."""
        raise UserError(message, do="see `penstock --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 a user's mistake, 1 a fault of ours."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    console = set_console(quiet="--quiet" in words, json=as_json)
    try:
        if find_place().rank > 0:
            console = set_console(quiet=True, speaker=f"rank {find_place().rank}")
        options = _parse(words)
        if options is not None:
            prepare_process()
            end_with_launcher()
            result = _call(options)
            _show(
                result if find_place().rank == 0 and not was_launched() else None, console, as_json
            )
    except UserError as error:
        return _mistake(console, error)
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has left (`| head`). Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fault(console, error)
    return 0


def _parse(words: list[str]) -> argparse.Namespace | None:
    """The command line; None when help or the version was all that was asked for."""
    values = {i + 1 for i, word in enumerate(words) if word in _FLAGS_WITH_VALUES}
    verbs = [w for i, w in enumerate(words) if not w.startswith("-") and i not in values]
    if verbs and verbs[0] not in VERBS:
        near = difflib.get_close_matches(verbs[0], VERBS, 1)
        do = f"did you mean {near[0]}?" if near else f"use one of {', '.join(VERBS)}"
        raise UserError(f"there is no verb {verbs[0]}", do=do)
    if "--version" in words:
        sys.stdout.write(f"penstock {__version__}\n")
        return None
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write(verb_help(verbs[0] if verbs else None) + "\n")
        return None
    if not verbs:
        raise UserError("there is no verb", do=f"use one of {', '.join(VERBS)}")
    parser = _Parser(prog="penstock", add_help=False, allow_abbrev=False)
    parser.add_argument("verb")
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--trust", metavar="SHA256", action="append", default=[])
    parser.add_argument("--from", metavar="SYSTEM", dest="system")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--processes", metavar="N")
    parser.add_argument("--hosts", metavar="FILE")
    if verbs[0] == "launch":
        parser.add_argument("--dry-run", action="store_true")
    if verbs[0] == "bench":
        parser.add_argument("--benchmark", metavar="NAME", action="append", default=[])
        parser.add_argument("--compare", metavar="FILE")
    return parser.parse_intermixed_args(words)


def _call(options: argparse.Namespace) -> Any:  # noqa: ANN401 - each verb has its own result
    """Load the config and run the verb."""
    keys: list[str] = options.keys
    # A file that is named may have any name, also one with a = in it.
    first = options.verb in ("inspect", "bench") and bool(keys) and not _names_key(keys[0])
    positional = [key for i, key in enumerate(keys) if "=" not in key or (first and i == 0)]
    overrides = [key for key in keys if key not in positional]
    if options.processes is not None:
        overrides.append(f"launch.processes={options.processes}")
    if options.verb == "launch":
        return _launch(options, positional, overrides)
    if options.hosts is not None:
        overrides += host_keys(read_hosts(options.hosts), overrides)
    if options.system is not None:
        overrides.append(f"from={options.system}")
    loaded = load_config(options.config, overrides, options.verb)
    if options.trust:
        trust = [*loaded.config.trust, *options.trust]
        config = loaded.config.model_copy(update={"trust": trust})
        loaded = LoadedConfig(config, {**loaded.origins, "trust": "command line"})
    from penstock import api  # noqa: PLC0415 - mistakes above are told before torch is loaded

    if options.verb in ("inspect", "convert", "import-config", "bench"):
        if len(positional) != 1:
            raise UserError(
                f"penstock {options.verb} takes one thing", do=VERBS[options.verb].usage
            )
        more: dict[str, Any] = {}
        if options.verb == "bench":
            more = {"benchmarks": options.benchmark, "compare": options.compare}
        run = getattr(api, options.verb.replace("-", "_"))
        return run(positional[0], loaded.config, **more)
    if positional:
        raise UserError(f"{positional[0]} is not key=value", do=VERBS[options.verb].usage)
    return _run_verb(api, options.verb, loaded)


def _launch(options: argparse.Namespace, verbs: list[str], keys: list[str]) -> None:
    """Training on every host of a file."""
    if verbs != ["train"] or options.hosts is None:
        raise UserError("launch starts training on hosts", do=VERBS["launch"].usage)
    section = load_config(options.config, keys, "train").config.launch
    words = ["train", *keys]
    words += ["--config", str(Path(options.config).resolve())] if options.config else []
    words += ["--quiet"] if options.quiet else []
    words += [word for digest in options.trust for word in ("--trust", digest)]
    launch_on_hosts(options.hosts, words, shell=section.remote_shell, dry_run=options.dry_run)


def _names_key(word: str) -> bool:
    """Whether a word is key=value for a key there is."""
    key, sign, _ = word.partition("=")
    return bool(sign) and key in all_keys()


def _run_verb(api: Any, verb: str, loaded: LoadedConfig) -> Any:  # noqa: ANN401 - a module, a result
    """Training also records where each setting came from."""
    if verb == "train":
        return api.train(loaded.config, origins=loaded.origins)
    return getattr(api, verb)(loaded.config)


def _show(result: Any, console: Console, as_json: bool) -> None:  # noqa: ANN401 - as above
    if result is None:
        return
    if as_json:
        console.write(json.dumps(result.json(), indent=2))
    else:
        result.show(console)


def _mistake(console: Console, error: UserError) -> int:
    """One line, and the same as JSON where that is asked for."""
    if was_launched() and leave_error(str(error)):
        return error.exit_code
    if console.json:
        console.write(json.dumps({"error": str(error)}))
    console.error(str(error))
    return error.exit_code


def _fault(console: Console, error: Exception) -> int:
    """What the machine ran out of, or forbids, is the user's to mend; all else is our fault."""
    lack = _lack(error)
    if lack is not None:
        return _mistake(console, lack)
    message = " ".join(f"internal fault: {error!r}. Details: {_fault_report()}".split())
    if console.json:
        console.write(json.dumps({"error": message}))
    console.error(message)
    return 1


def _lack(error: Exception) -> UserError | None:
    """A full disk, a missing permission, too little memory or too few open files; else None."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error).lower()
    if isinstance(error, OSError) and number in _FILE_TROUBLE:
        return UserError(f"{error.strerror} ({error.filename or 'writing a file'})")
    # Libraries tell in their own words what the system told them.
    if number in _TOO_MANY_FILES or "too many open files" in text:
        return UserError("too many open files", do="raise `ulimit -n`; saved checkpoints are whole")
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return UserError(
            "there is not enough memory",
            do="use a smaller batch.micro or a machine with more; saved checkpoints are whole",
        )
    return None


def _fault_report() -> str:
    """Write the traceback to a file of its own and return its path."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="penstock-fault-", suffix=".txt", delete=False, encoding="utf-8"
    ) as handle:
        traceback.print_exc(file=handle)
    return str(Path(handle.name))
