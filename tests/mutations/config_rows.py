"""Planted bugs in what a configuration is told: hints, names of items, what is written, what is refused. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_CONFIG, _REGISTRY, _TRAINER = "tests/core/test_config.py", "tests/core/test_registry.py", "tests/core/test_trainer.py"
_NEAR = f"{_REGISTRY}::test_only_a_name_that_is_near_is_suggested"
_ITEMS = f"{_CONFIG}::test_an_item_of_a_list_is_addressed_by_its_name_or_its_class_or_its_place"
_SENTENCES = f"{_CONFIG}::test_each_mistake_has_its_sentence"
_TEXTS = f"{_CONFIG}::test_a_text_that_looks_like_something_else_survives_dump_and_load"

CONFIG: tuple[Row, ...] = (
    ("registry: any name that shares letters is near", "mmrl/registry.py", "NEAR = 0.7", "NEAR = 0.6", _NEAR),
    (
        "registry: what names have in common makes up for the rest",
        "mmrl/registry.py",
        "return len(ours) != len(theirs) or all(",
        "return len(ours) != len(theirs) or any(",
        _NEAR,
    ),
    (
        "registry: every module is listed where none is near",
        "mmrl/registry.py",
        'if module.rpartition(".")[0] == folder]',
        "if module.startswith(folder)]",
        f"{_REGISTRY}::test_each_mistake_has_its_sentence",
    ),
    (
        "component: an item without a name has none",
        "mmrl/component.py",
        'return class_name(item["target"]) if isinstance(item.get("target"), str) else str(index)',
        "return str(index)",
        _ITEMS,
    ),
    (
        "component: of several items the first is meant",
        "mmrl/component.py",
        "if names.count(key) > 1:",
        "if names.count(key) > len(names):",
        _ITEMS,
    ),
    (
        "config: a text is written as if YAML 1.1 read it",
        "mmrl/config.py",
        "Dumper=_Dumper",
        "Dumper=yaml.SafeDumper",
        _TEXTS,
    ),
    ("config: an interpolation is escaped whatever stands before it", "mmrl/config.py", r'r"\1\1\\${"', r'r"\1\\${"', _TEXTS),
    (
        "config: a class of another kind is taken",
        "mmrl/config.py",
        "if not hasattr(component.cls, needed):",
        "if False:",
        _SENTENCES,
    ),
    (
        "config: a supervised term may be unlearned",
        "mmrl/config.py",
        "weight: NonNegativeFloat | Annotated",
        "weight: float | Annotated",
        _SENTENCES,
    ),
    (
        "trainer: a later stage is refused without a word of what is saved",
        "mmrl/trainer.py",
        "policy = self._next(index, policy).run()",
        "policy = Stage(self, index, policy, None).run()",
        f"{_TRAINER}::test_a_later_stage_that_is_refused_says_how_the_run_goes_on",
    ),
    (
        "learners: groups are refused without the stage",
        "mmrl/learners.py",
        'where=f"{self.where}.optimizer",',
        'where="optimizer",',
        f"{_TRAINER}::test_a_later_stage_that_is_refused_says_how_the_run_goes_on",
    ),
    (
        "playback: what is for training is overridden in silence",
        "mmrl/playback.py",
        '    refuse_unread(run_dir / "config.yaml", overrides, _READ, stage.name)\n',
        "",
        f"{_TRAINER}::test_a_change_that_measuring_a_run_would_not_notice_is_refused",
    ),
    (
        "report: rewards that a stage changes by name are none",
        "mmrl/report/trained.py",
        '_blocks({"rewards": merge(own, changes)})',
        '_blocks({"rewards": changes})',
        "tests/core/test_report_pictures.py::test_which_scores_something_is_trained_on",
    ),
)
