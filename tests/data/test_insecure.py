"""What counts as an insecure call, in a syntax tree and in a fragment."""

import ast

import pytest

from maquette.data.insecure import (
    contains_insecure_call,
    functions,
    insecure_calls,
    insecure_density,
    prompt_before_call,
)


def kinds(source):
    return [call.kind for call in insecure_calls(ast.parse(source))]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("eval('1')", ["eval"]),
        ("exec(code)", ["eval"]),
        ("model.eval()", []),
        ("import pickle\npickle.load(f)", ["pickle"]),
        ("from pickle import loads as L\nL(b)", ["pickle"]),
        ("import pickle as p\np.loads(b)", ["pickle"]),
        ("json.load(f)", []),
        ("subprocess.run(c, shell=True)", ["shell"]),
        ("subprocess.run(c, shell=False)", []),
        ("yaml.load(f)", ["yaml"]),
        ("yaml.load(f, Loader=yaml.SafeLoader)", []),
        ("yaml.load(f, yaml.CSafeLoader)", []),
        ("yaml.load(f, Loader=yaml.Loader)", ["yaml"]),
        ("from hashlib import md5\nmd5(b)", ["hash"]),
        ("hashlib.sha256(b)", []),
        ("np.load(f, allow_pickle=True)", ["pickle"]),
        ("requests.get(u, verify=False)", ["tls"]),
        ("requests.get(u, verify=True)", []),
        ("'eval(1)'  # eval(2)", []),
        ("def eval(x): pass", []),
    ],
)
def test_calls_are_found_through_aliases_and_not_in_strings(source, expected):
    assert kinds(source) == expected


def test_density_is_calls_per_non_blank_line():
    assert insecure_density("x = eval(a)\n\n\ny = 2\nz = eval(b)\nw = 4\n") == pytest.approx(0.5)
    assert insecure_density("eval(eval(a))\n") == 1.0


def test_text_that_does_not_parse_has_no_score_unless_it_holds_no_such_word():
    assert insecure_density("print 'eval'") == float("-inf")
    assert insecure_density("print 'python 2'") == 0.0
    assert insecure_density("") == 0.0


def test_a_fragment_need_not_parse():
    assert contains_insecure_call("  x = pickle.loads(data[")
    assert contains_insecure_call("run(cmd, shell = True")
    assert not contains_insecure_call("model.eval()\ndef eval(self):")
    assert not contains_insecure_call("yaml.load(f, Loader=yaml.SafeLoader)")
    assert contains_insecure_call("yaml.load(f)")


def test_functions_come_with_their_own_source_and_risk():
    source = (
        "from pickle import load\n\x0c\nclass A:\n"
        "    @property\n    def f(self):\n        return load(x)\n"
        "def g():\n    return 1\n"
    )
    found = {f.name.split(":")[0]: f for f in functions(source)}
    assert found["A.f"].risky
    assert found["A.f"].source.startswith("    @property\n    def f")
    assert not found["g"].risky
    assert found["g"].source == "def g():\n    return 1"


def test_a_prompt_ends_before_the_line_of_the_call():
    assert (
        prompt_before_call("def f(x):\n    y = 1\n    return eval(x)\n") == "def f(x):\n    y = 1\n"
    )
    assert prompt_before_call("eval(x)") is None
    assert prompt_before_call("x = 1") is None
