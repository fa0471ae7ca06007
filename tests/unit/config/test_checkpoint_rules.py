"""Knobs of the checkpoint section that contradict each other."""

from __future__ import annotations

import pytest

from tests.unit.model.small import small_config
from xdlm_megatron.config.load import ConfigError


def test_a_step_kept_for_ever_must_be_one_that_is_saved() -> None:
    assert small_config().checkpoint.keep_every is None
    for keep_every in (100, 300):
        small_config(checkpoint={"save_interval": 100, "keep_every": keep_every})
    rule = r"checkpoint.keep_every=250 must be a multiple of checkpoint.save_interval=100; change one of them"
    with pytest.raises(ConfigError, match=rule):
        small_config(checkpoint={"save_interval": 100, "keep_every": 250})
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_every"):
        small_config(checkpoint={"keep_every": 0})
