import errno
import importlib
import json
import os
import subprocess
import sys

import pytest

from moekit.cli import errors
from moekit.cli.common import check_out, output, table_lines
from moekit.cli.compress import VERBS as COMPRESS_VERBS
from moekit.cli.lazy import command_of, load_verb
from moekit.cli.main import VERBS, load_command, load_function
from moekit.core.errors import UserError

from .conftest import start

GROUPS = {"compress": COMPRESS_VERBS}
HEAVY = {"torch", "transformers", "rich", "numpy"}


@pytest.mark.parametrize(
    "args",
    [["--help"], ["list"], ["list", "--kind", "measure"], ["show", "-h"], ["compress", "-h"]],
)
def test_help_and_list_import_nothing_heavy(args):
    """What keeps them under 0.3 s, without a clock that a busy machine would upset."""
    code = f"import sys; from moekit.cli.main import entry\ntry: entry({args})\n"
    code += f"finally: print({HEAVY} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "set()"


def test_help_shows_every_verb(moekit):
    for args in ((), ("--help",), ("-h",)):
        done = moekit(*args)
        assert done.code == 0
        for verb, (_, line) in VERBS.items():
            assert f"  {verb} " in done.out
            assert line in done.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb(verb, moekit):
    """Its help line is its docstring's first; it has --json and --seed; its help works."""
    if verb in GROUPS:
        done = moekit(verb, "--help")
        assert VERBS[verb][1] in done.out
        return
    assert load_function(verb).__doc__.splitlines()[0] == VERBS[verb][1]
    options = {name for parameter in load_command(verb).params for name in parameter.opts}
    assert {"--json", "--seed"} <= options
    done = moekit(verb, "--help")
    assert done.code == 0
    assert VERBS[verb][1] in done.out


@pytest.mark.parametrize(
    ("group", "verb"), [(group, verb) for group, table in GROUPS.items() for verb in table]
)
def test_every_verb_of_a_group(group, verb, moekit):
    line = GROUPS[group][verb][1]
    assert load_verb(GROUPS[group], verb).__doc__.splitlines()[0] == line
    options = {n for parameter in command_of(GROUPS[group], verb).params for n in parameter.opts}
    assert {"--json", "--seed"} <= options
    assert line in moekit(group, "--help").out
    assert line in moekit(group, verb, "--help").out


def test_version(moekit):
    import moekit as package

    assert moekit("--version").out == f"moekit {package.__version__}\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("inspct",), "no verb 'inspct': did you mean inspect?"),
        (("zzz",), "no verb 'zzz': verbs are run, serve, inspect"),
        (("--jsn",), "no such option: --jsn"),
        (("list", "--knd", "x"), "--kind"),
        (("show",), "missing argument 'METHOD'"),
        (("list", "--seed", "x"), "--seed"),
        (("list", "--kind", "mesure"), "did you mean measure?"),
        (("show", "bits-per-bite"), "did you mean bits-per-byte?"),
    ],
)
def test_wrong_use_gets_a_hint(refused, args, words):
    assert words in refused(*args)


def test_list_and_show(moekit):
    assert "bits-per-byte" in moekit("list", "bits*").out
    assert moekit("list", "zzz").out == "no method matches\n"
    methods = moekit("list", "--json").json["methods"]
    assert "bits-per-byte" in {method["name"] for method in methods}
    for method in methods:
        shown = moekit("show", method["name"], "--kind", method["kind"], "--json").json
        assert shown == method
        text = moekit("show", method["name"], "--kind", method["kind"]).out
        assert method["title"] in text
        for option in method["options"]:
            assert option["help"] in text


def fail_with(monkeypatch, error):
    def verb(*args, **options):
        raise error

    monkeypatch.setattr(importlib.import_module("moekit.cli.show").registry, "find", verb)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no\nway"), 2, "error: no\nway\n"),
        (OSError(errno.ENOSPC, "x", "/out/a"), 2, "/out/a: no space left on device; free some"),
        (PermissionError(errno.EACCES, "x", "/out"), 2, "/out: permission denied; check the"),
        (OSError("bare words"), 2, "error: bare words"),
        (MemoryError("7 GB"), 2, "not enough memory: 7 GB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("the same command resumes"), 130, "the same command resumes"),
    ],
)
def test_exceptions_become_a_line_and_a_code(moekit, monkeypatch, error, code, words):
    fail_with(monkeypatch, error)
    done = moekit("show", "x", "--json")
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert "Traceback" not in done.err


def test_a_programming_error_is_not_hidden(moekit, monkeypatch):
    fail_with(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        moekit("show", "x")


def test_a_reader_that_goes_away_is_no_error():
    process = start("list", "--json", stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(300) == 1
    assert process.stderr.read() == ""


def test_json_output_keeps_standard_output_clean(capsys):
    with output(True) as out:
        print("noise")
        out.line("words")
        out.result({"nan": float("nan"), "é": [1.5, float("inf")], "path": None})
    done = capsys.readouterr()
    assert json.loads(done.out) == {"nan": None, "é": [1.5, None], "path": None}
    assert "noise" in done.err


def test_table_lines():
    rows = [("a", 1.5, "x"), ("long", 22, "-")]
    assert table_lines(rows, ("name", "n", "")) == ["name    n", "a     1.5  x", "long   22  -"]


def test_check_out(tmp_path):
    assert check_out(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    with pytest.raises(UserError, match="exists already"):
        check_out(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a directory"):
        check_out(tmp_path / "file" / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_out_needs_a_writable_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_out(tmp_path / "x")


def test_refused_by_the_system_while_writing(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written"):
        check_out(tmp_path / "x")


def test_advice_is_for_known_errors_only():
    assert errors.describe_os_error(OSError(errno.EIO, "x", "f")) == "f: input/output error"
