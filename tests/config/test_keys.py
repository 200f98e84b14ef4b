"""Keys: every one known by its type, the nearest named for a misspelt one."""

import pytest

from penstock.config.keys import all_keys, is_section, kinds, require_key, takes_list_of_text
from penstock.errors import ConfigError


def test_keys_have_the_kinds_their_schema_says() -> None:
    assert kinds("train.steps") == {int, type(None)}
    assert kinds("evaluate.split") == {str}
    assert kinds("model.from") == {str, type(None)}
    assert kinds("source.path") == {str, list, type(None)}
    assert kinds("optimizer.betas") == {list}
    assert kinds("compile.mode") == {str}
    assert kinds("schema_version") == {int}
    assert kinds("optimizer.decay_all") == {bool}
    assert kinds("no.key") == frozenset()


def test_every_key_takes_something_known() -> None:
    plain = {str, int, float, bool, list, type(None)}
    for key in all_keys():
        assert kinds(key), key
        assert kinds(key) <= plain, key
        assert not is_section(key)
        require_key(key, "here")


def test_lists_of_text_are_known() -> None:
    taking = {key for key in all_keys() if takes_list_of_text(key)}
    assert {"trust", "source.path", "generate.stop"} <= taking
    assert "data.splits" not in taking


@pytest.mark.parametrize("key", sorted(all_keys()))
def test_a_key_with_a_letter_too_many_is_recognised(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_key(f"{key}x", "here")
    assert f"did you mean {key}?" in str(caught.value)


def test_a_verbs_own_section_may_be_left_out() -> None:
    from penstock.config.load import load_config

    loaded = load_config(None, ["tasks=[lambada]", "seed=3"], "evaluate")
    assert loaded.config.evaluate.tasks == ["lambada"]
    assert loaded.config.seed == 3
    assert loaded.origins["evaluate.tasks"] == "command line"
    assert load_config(None, ["steps=5"], "train").config.train.steps == 5
    with pytest.raises(ConfigError, match="there is no key steps"):
        load_config(None, ["steps=5"], "evaluate")
