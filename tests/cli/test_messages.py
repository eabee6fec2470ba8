from __future__ import annotations

import pytest

from lightning_cap.cli.messages import near, one_line


def test_the_branch_that_came_furthest_is_told() -> None:
    tree = """Parser key "trainer.callbacks" element 2:
  Does not validate against any of the Union subtypes
  Subtypes: [list[Callback], <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'a.B':
        Parser key "pruner":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'str'>, <class 'a.Pruner'>, <class 'NoneType'>]
          Errors:
            - Expected a <class 'str'>
            - Problem with given class_path 'a.C':
                Parser key "damp":
                  Expected a <class 'float'>. Got value: many
                    words
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: x
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [1]"""
    assert one_line(tree) == "trainer.callbacks[1].pruner.damp: give a number, not many words"


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ("unrecognized arguments: --x", "unrecognized arguments: --x"),
        ('Parser key "a":\n  Expected a <class \'int\'>. Got value: None', "a: give a whole number, not None"),
        ('Parser key "a":\n  Expected <class \'list\'>', "a: give a list"),
        ('Parser key "a":\n  Does not validate against any of the Union subtypes\n  Errors:\n    - Expected a <class \'int\'>\n'
         "  Given value type: <class 'str'>\n  Given value: ", "a: give a whole number, not ''"),
        ("something\n  of another\nversion", "something of another version"),
        ("Does not validate against any of the Union subtypes\nin another way",
         "Does not validate against any of the Union subtypes in another way"),
    ],
)  # fmt: skip
def test_one_line(told: str, line: str) -> None:
    assert one_line(told) == line


def test_near() -> None:
    assert near("block_sise", ["damp", "block_size"]) == "; did you mean 'block_size'?"
    assert near("zebra", ["damp", "block_size"]) == ""
