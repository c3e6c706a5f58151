"""The tools for an assistant, asked by the official client over standard input and output."""

import base64
import io
import json
import signal
import subprocess
import sys

import anyio
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from PIL import Image


@pytest.fixture(scope="module")
def asked(ui_atlas, tmp_path_factory, tile_folder):
    """Every answer of one conversation with the server, by the name of the question."""
    import shutil

    atlas = shutil.copytree(ui_atlas, tmp_path_factory.mktemp("mcp") / "atlas")
    picture = str(sorted((tile_folder / "cat").iterdir())[0])
    box = {"slide": "case-1", "x": 300, "y": 300, "width": 300, "height": 300}
    questions = {
        "about": ("about", {}),
        "slides": ("slides", {"contains": "CASE"}),
        "picture": ("search", {"images": [picture], "k": 3}),
        "tile": ("search", {"tiles": [1], "k": 4, "where": "slide = 'case-1'"}),
        "box": ("search", {"box": box, "k": 2}),
        "similar": ("similar_slides", {"slide": "case-1", "k": 1}),
        "clusters": ("clusters", {}),
        "annotations": ("annotations", {"slide": "case-1"}),
        "facts": ("tile", {"tile": 1}),
        "image": ("tile_image", {"tile": 1}),
        "slide image": ("slide_image", {"slide": "case-1"}),
        "no file": ("search", {"images": ["/nowhere/x.png"]}),
        "no tile": ("tile", {"tile": 10**9}),
        "bad filter": ("search", {"tiles": [1], "where": "colour = 'red'"}),
        "words": ("search", {"words": ["gland"]}),
        "nothing": ("search", {}),
    }

    async def ask():
        command = ["-m", "histoseek", "mcp", str(atlas)]
        server = StdioServerParameters(command=sys.executable, args=command)
        async with Client(stdio_client(server)) as client:
            found = {"tools": (await client.list_tools()).tools}
            for name, (tool, arguments) in questions.items():
                found[name] = await client.call_tool(tool, arguments)
            return found

    answers = anyio.run(ask)
    answers["log"] = [json.loads(line) for line in (atlas / "audit.jsonl").read_text().splitlines()]
    return answers


def read(answer):
    assert not answer.is_error, answer.content
    return answer.structured_content


def test_its_tools_only_read(asked):
    assert {tool.name for tool in asked["tools"]} == {
        "about", "slides", "search", "similar_slides", "clusters", "annotations", "tile", "tile_image",
        "slide_image",
    }  # fmt: skip
    assert all(tool.annotations.read_only_hint and tool.description for tool in asked["tools"])


def test_it_answers_as_the_page_does(asked):
    about = read(asked["about"])
    assert about["tiles"] > 0 and "label" in about["fields"] and not about["searches_by_words"]
    assert [row["name"] for row in read(asked["slides"])["slides"]] == ["case-1", "case-2"]
    found = read(asked["picture"])
    assert len(found["hits"]) == 3 and found["hits"][0]["label"] == "cat"
    assert found["hits"][0]["score"] > 0.999 and "Nearest labels" in found["verdict"]
    assert "no diagnosis" in found["provenance"]["notice"]
    assert {hit["slide"] for hit in read(asked["tile"])["hits"]} == {"case-1"}
    assert read(asked["box"])["hits"][0]["slide"] == "case-1"
    assert read(asked["similar"])["slides"][0]["name"] != "case-1"
    assert sum(row["tiles"] for row in read(asked["clusters"])["clusters"]) == about["tiles"]
    assert read(asked["annotations"]) == {"type": "FeatureCollection", "features": []}
    assert read(asked["facts"])["tile"] == 1
    for name in ("image", "slide image"):
        (content,) = asked[name].content
        assert content.mime_type == "image/jpeg"
        Image.open(io.BytesIO(base64.b64decode(content.data))).load()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no file", "/nowhere/x.png is not a file"),
        ("no tile", "no tile 1000000000"),
        ("bad filter", "colour"),
        ("words", "text"),
        ("nothing", "nothing to search for"),
    ],
)
def test_what_is_wrong_is_said(name, says, asked):
    assert asked[name].is_error and says in asked[name].content[0].text


def test_searches_are_in_the_audit_log(asked):
    lines = asked["log"]
    assert [line["action"] for line in lines] == ["search"] * 3 + ["similar"]
    assert all(line["address"].startswith("mcp") and line["user"] for line in lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_order(ui_atlas, number, code, tmp_path):
    command = [sys.executable, "-m", "histoseek", "mcp", str(ui_atlas)]
    command += ["--audit-log", str(tmp_path / "audit.jsonl")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        about = {"protocolVersion": "2025-06-18", "capabilities": {}}
        about["clientInfo"] = {"name": "test", "version": "1"}
        hello = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": about}
        server.stdin.write(json.dumps(hello) + "\n")
        server.stdin.flush()
        assert json.loads(server.stdout.readline())["id"] == 1
        server.send_signal(number)
        assert server.wait(20) == code, "its input is still open"
        assert server.stdout.read() == "", "nothing but the protocol"
