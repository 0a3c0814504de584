"""docs/flags.md is generated and current."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lsh.config.compat import NO_EFFECT, REJECTED
from megatron_lsh.config.config import Config
from megatron_lsh.config.reference import SCRIPTS, flags_markdown
from megatron_lsh.config.settings import settings_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "flags.md"
CONFIGURATIONS = [cls for classes in SCRIPTS.values() for cls in classes]


def test_the_page_is_current() -> None:
    fix = "run: python -m megatron_lsh.config.reference > docs/flags.md"
    assert PAGE.read_text(encoding="utf-8") == flags_markdown(), fix


def test_all_entry_scripts_are_described() -> None:
    scripts = [*ROOT.glob("pretrain_*.py"), *ROOT.glob("finetune_*.py")]
    assert {path.name for path in scripts} == set(SCRIPTS)


@pytest.mark.parametrize("config_class", CONFIGURATIONS)
def test_the_page_names_every_flag(config_class: type[Config]) -> None:
    page = flags_markdown()
    for flag in [setting.flag for setting in settings_of(config_class).values()] + [*NO_EFFECT, *REJECTED]:
        assert f"`{flag}`" in page


def test_each_section_is_there_once_and_says_whose_it_is() -> None:
    sections = dict(part.split("\n", 1) for part in flags_markdown().split("\n## ")[1:])
    assert flags_markdown().count("\n## ") == len(sections)
    named = {name: [script for script in SCRIPTS if script in text.split("\n| ")[0]] for name, text in sections.items()}
    assert named["bert"] == ["pretrain_bert_moe.py", "finetune_classification.py"]
    assert named["t5"] == ["pretrain_t5_moe.py", "finetune_classification.py"]
    assert named["finetune"] == ["finetune_classification.py"]
    assert named["model"] == []
    assert "`--mask-prob`" in sections["bert"] and "`--mask-prob`" in sections["t5"]
    assert "`--mask-prob`" not in sections["Megatron-LM flags that are rejected"]


@pytest.mark.parametrize("config_class", CONFIGURATIONS)
def test_help_texts_are_in_one_style(config_class: type[Config]) -> None:
    for setting in settings_of(config_class).values():
        assert setting.help and not setting.help.endswith("."), setting.flag
        assert setting.off is None or setting.default is True, setting.flag
        assert setting.kind is not bool or setting.default is False or setting.off is not None, setting.flag
