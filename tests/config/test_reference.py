"""docs/flags.md is generated and current."""

from __future__ import annotations

from pathlib import Path

from megatron_lsh.config.compat import NO_EFFECT, REJECTED
from megatron_lsh.config.config import Config
from megatron_lsh.config.reference import flags_markdown
from megatron_lsh.config.settings import settings_of

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def test_the_page_is_current() -> None:
    fix = "run: python -m megatron_lsh.config.reference > docs/flags.md"
    assert PAGE.read_text(encoding="utf-8") == flags_markdown(), fix


def test_the_page_names_every_flag() -> None:
    page = flags_markdown()
    for flag in [setting.flag for setting in settings_of(Config).values()] + [*NO_EFFECT, *REJECTED]:
        assert f"`{flag}`" in page


def test_help_texts_are_in_one_style() -> None:
    for setting in settings_of(Config).values():
        assert setting.help and not setting.help.endswith("."), setting.flag
        assert setting.off is None or setting.default is True, setting.flag
        assert setting.kind is not bool or setting.default is False or setting.off is not None, setting.flag
