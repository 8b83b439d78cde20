"""What lusifer touches inside uvicorn is still there; a failure names what has moved."""

from __future__ import annotations

import inspect

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from lusifer.hooks.uvicorn import DrainingServer, LimitedProtocol

PROTOCOL = {
    "connection_made": ["self", "transport"],
    "data_received": ["self", "data"],
    "connection_lost": ["self", "exc"],
    "on_response_complete": ["self"],
    "pause_writing": ["self"],
    "resume_writing": ["self"],
    "send_400_response": ["self", "msg"],
}
SERVER = {"handle_exit": ["self", "sig", "frame"], "on_tick": ["self", "counter"]}


@pytest.mark.parametrize(("owner", "names"), [(H11Protocol, PROTOCOL), (uvicorn.Server, SERVER)])
def test_methods_that_are_overridden_exist(owner, names):
    for name, parameters in names.items():
        assert name in vars(owner), f"{owner.__name__}.{name} has moved"
        assert list(inspect.signature(vars(owner)[name]).parameters) == parameters, f"{owner.__name__}.{name}"


def test_nothing_else_of_uvicorn_is_overridden():
    for own, base, names in ((LimitedProtocol, H11Protocol, PROTOCOL), (DrainingServer, uvicorn.Server, SERVER)):
        assert set(vars(own)) & set(vars(base)) - {"__module__", "__doc__", "__init__"} == set(names)


def test_attributes_of_a_connection():
    source = inspect.getsource(H11Protocol)
    for name in ("app_state", "connections", "cycle", "loop", "transport"):
        assert f"self.{name}" in source, f"H11Protocol.{name} has moved"
    assert '"state": self.app_state' in source, "H11Protocol.app_state is no longer the scope's state"
    assert "self.response_complete" in inspect.getsource(RequestResponseCycle)


def test_attributes_of_a_server():
    server = uvicorn.Server(uvicorn.Config(app=None))
    assert server.should_exit is False and server.force_exit is False
