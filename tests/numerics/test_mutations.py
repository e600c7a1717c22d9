"""The list of planted bugs stays applicable: a refactoring that moves a line has to move its bug too."""

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIST = runpy.run_path(str(ROOT / "tests" / "mutations" / "mutations.py"))
MUTATIONS = LIST["MUTATIONS"]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_still_applies_and_its_tests_exist(mutation):
    original = (ROOT / mutation.file).read_text()
    mutant = mutation.apply(original)
    assert ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(original))
    assert mutation.tests
    for node in mutation.tests:
        file, *names = node.split("::")
        tree = ast.parse((ROOT / file).read_text())
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert {name.split("[")[0] for name in names} <= defined, node


def test_names_are_unique():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("text", ["nothing here", "a = 1; a = 1"])
def test_a_source_that_is_not_there_exactly_once_is_refused(text):
    mutation = LIST["Mutation"]("bug", "file.py", "a = 1", "a = 2", ("test.py",))
    with pytest.raises(LookupError, match="expected once"):
        mutation.apply(text)
    assert mutation.apply("b = 0; a = 1") == "b = 0; a = 2"
