"""The arguments that `find` and `inspect` share: in both signatures, with one default, and checked."""

import inspect

import pytest
import zoo

import testreg
from testreg.finding.survey import Running, Survey

SHARED = {"processor": None, "batch_size": 16, "workers": 0, "progress": False}


@pytest.mark.parametrize("function", [testreg.find, testreg.inspect])
def test_users_see_them_one_by_one(function):
    found = inspect.signature(function).parameters
    assert {name: found[name].default for name in SHARED} == SHARED
    assert {found[name].kind for name in (*SHARED, "threshold")} == {inspect.Parameter.KEYWORD_ONLY}
    assert list(found)[:2] == ["model", "images"]
    assert not [one for one in found.values() if one.kind is one.VAR_KEYWORD]
    assert set(Running.__annotations__) == set(SHARED) == {name for name in SHARED if hasattr(Survey, name)}
    assert all(name in testreg.find.__doc__ for name in SHARED)


@pytest.mark.parametrize("function", [testreg.find, testreg.inspect])
def test_an_unknown_one_is_told_before_any_work(function):
    with pytest.raises(TypeError, match=r"^got an unexpected keyword argument 'bach_size'$"):
        function(None, None, bach_size=3)


def test_they_reach_the_images(monkeypatch):
    seen = []
    monkeypatch.setattr("testreg.finding.survey.stream", lambda *given, **more: seen.append((given, more)) or 1 / 0)
    model, processor = zoo.build("ViTModel")[0], object()
    for function in (testreg.find, testreg.inspect):
        with pytest.raises(ZeroDivisionError):
            function(model, "photos", processor=processor, batch_size=3, workers=2)
    expected = (("photos", processor), {"model": model, "batch_size": 3, "workers": 2, "share": (0, 1)})
    assert seen == [expected, expected]
