"""Embeddings in the form of OpenAI's API, asked by its official client."""

import base64

import httpx2
import numpy as np
import pytest
from openai import APIStatusError, NotFoundError, OpenAI

from histoseek.serving.encoders.open import open_encoder


@pytest.fixture(scope="module")
def official(client):
    """The official client, whose requests go to the app."""

    def handle(request):
        reply = client.request(
            request.method, request.url.raw_path.decode(), content=request.content,
            headers={k: v for k, v in request.headers.items() if k not in {"host", "authorization"}},
        )  # fmt: skip
        return httpx2.Response(
            reply.status_code, headers=dict(reply.headers), content=reply.content
        )

    transport = httpx2.Client(transport=httpx2.MockTransport(handle))
    return OpenAI(
        base_url="http://127.0.0.1:7860/v1", api_key="none", http_client=transport, max_retries=0
    )


@pytest.fixture(scope="module")
def blobs(tile_folder):
    return [path.read_bytes() for path in sorted((tile_folder / "cat").iterdir())[:3]]


def data_url(blob):
    return "data:image/png;base64," + base64.b64encode(blob).decode()


def test_the_official_client_gets_the_encoders_embeddings(official, served, blobs):
    model = served.session.atlas.manifest.name
    tiles = [served.session.read(blob, "a") for blob in blobs]
    expected = open_encoder("default").embed(np.stack(tiles))
    urls = [data_url(blob) for blob in blobs]
    answer = official.embeddings.create(model=model, input=urls)  # the client asks for base64
    assert answer.model == model and [each.index for each in answer.data] == [0, 1, 2]
    found = np.array([each.embedding for each in answer.data])
    assert np.abs(found - expected).max() < 1e-5
    plain = official.embeddings.create(model=model, input=urls[0], encoding_format="float")
    assert np.abs(np.array(plain.data[0].embedding) - expected[0]).max() < 1e-5


def test_parts_are_images_too(client, blobs):
    url = data_url(blobs[0])
    parts = [
        {"image": base64.b64encode(blobs[0]).decode()},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
    ]
    rows = client.post("/v1/embeddings", json={"input": parts}).json()["data"]
    assert rows[0]["embedding"] == rows[1]["embedding"] == rows[2]["embedding"]


def test_what_is_wrong_is_said(official, served, blobs):
    model, url = served.session.atlas.manifest.name, data_url(blobs[0])
    with pytest.raises(NotFoundError, match=f"no model 'other' here; this atlas has '{model}'"):
        official.embeddings.create(model="other", input=url)
    for wrong, says in (
        ({"input": "gland"}, "text"),
        ({"input": url, "dimensions": 7}, "dimensions is 7"),
        ({"input": [{"image_url": "https://example.org/x.png"}]}, "fetches no URL"),
        ({"input": [{"text": "a", "image": "b"}]}, "2 contents"),
        ({"input": "data:image/png;base64,AAAA"}, "not an image"),
        ({"input": []}, "input"),
    ):
        with pytest.raises(APIStatusError, match=says):
            official.embeddings.create(model=model, **wrong)
