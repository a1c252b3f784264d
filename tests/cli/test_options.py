"""What commands call things: the same word for the same thing, and the version that runs."""

import re

import pytest
from click.testing import CliRunner

import testreg
from testreg.cli import main


def said(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    return result.stdout


def test_the_version_is_that_of_the_code_that_runs(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1 of another installation")
    assert said("--version") == f"testreg, version {testreg.__version__}\n"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("patch", {"--replace", "--force"}),
        ("export", {"--replace", "--force"}),
        ("find", {"--force"}),  # a plan's file is replaced by a plan
        ("demo", {"--replace"}),
    ],
)
def test_replacing_and_accepting_harm_are_two_flags(command, flags):
    told = dict(re.findall(r"^  (--replace|--force) +(.*(?:\n {10,}.*)*)", said(command, "--help"), re.MULTILINE))
    assert told.keys() == flags
    for flag, help in told.items():
        assert ("refuses" in help or "drift" in help) == (flag == "--force")
        assert ("eplace the" in help or "Use a directory" in help) == (flag == "--replace")


LIMIT = "No such option '--limt'. --limit is an option of `testreg evaluate`, `testreg report`."


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("evaluate", "MODEL", "--limt", "3"), "No such option '--limt'. (Did you mean one of: '--clip', '--limit'?)"),
        (("inspect", "MODEL", "--imges", "photos"), "No such option '--imges'. Did you mean '--images'?"),
        (
            ("inspect", "MODEL", "--limt", "3"),
            LIMIT,
        ),
        (
            ("find", "MODEL", "--replace"),
            "--replace is an option of `testreg demo`, `testreg export`",
        ),
        (("--limt", "3", "evaluate"), LIMIT),
        (("find", "MODEL", "--nonsense"), "No such option '--nonsense'."),
    ],
)
def test_a_mistyped_option_leads_to_the_right_one(given, told):
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 2
    assert told in result.stderr.splitlines()[-1]
    assert ("is an option of" in result.stderr) == ("is an option of" in told)
