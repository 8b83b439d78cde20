"""Bulk encoding beyond one machine: object stores, and a Ray cluster that loses its workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from dataclasses import replace

import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer import LusiferError
from lusifer.bulk.job import Settings
from lusifer.bulk.run import encode
from support.texts import content, some_texts

SETTINGS = Settings(precision="float32", shard_rows=100)
TEXTS = some_texts(1050)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n".join(TEXTS[:600]) + "\n", encoding="utf-8")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[600:900])
    (tmp_path / "in" / "b.jsonl").write_text(rows)
    parquet.write_table(pa.table({"text": TEXTS[900:]}), tmp_path / "in" / "c.parquet", row_group_size=70)
    return tmp_path / "in"


def refused(*args, **kwargs):
    with pytest.raises(LusiferError) as caught:
        encode(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shards(folder):
    return {name: data for name, data in content(folder).items() if name.startswith("part-")}


# ---------------------------------------------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def server():
    """A server that speaks S3, in the environment of this process and of those it starts; None where there is none."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        yield None
        return
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server):
    """An empty bucket, as s3fs sees it."""
    s3fs = pytest.importorskip("s3fs")
    if server is None:
        pytest.skip("needs moto[server]")
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST"))
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.mkdir("bucket")
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_in_and_out_are_as_files_here(model, source, s3, tmp_path):
    for path in source.iterdir():
        s3.put_file(str(path), f"bucket/in/{path.name}")
    encode(model, str(source), str(tmp_path / "out"), SETTINGS)
    expected = shards(tmp_path / "out")
    facts = encode(model, "s3://bucket/in", "s3://bucket/out", SETTINGS)
    assert facts["texts"] == 1050 and facts["shards"] == 11
    names = sorted(path.rsplit("/", 1)[1] for path in s3.ls("bucket/out", refresh=True))
    assert names == ["_manifest.json", *sorted(expected)]
    assert {name: s3.cat_file(f"bucket/out/{name}") for name in expected} == expected
    manifest = json.loads(s3.cat_file("bucket/out/_manifest.json"))
    assert [file["url"] for file in manifest["input"]] == [
        f"s3://bucket/in/{name}" for name in ("a.txt", "b.jsonl", "c.parquet")
    ]
    # Some shards are lost: only they are made again.
    before = {name: s3.info(f"bucket/out/{name}")["LastModified"] for name in expected}
    s3.rm_file("bucket/out/part-00004.parquet")
    s3.pipe_file("bucket/out/_manifest.json", json.dumps({**manifest, "complete": False}).encode())
    time.sleep(1.1)  # The store's times are in seconds.
    assert encode(model, "s3://bucket/in/*", "s3://bucket/out", SETTINGS, processes=2) == facts
    s3.invalidate_cache()
    after = {name: s3.info(f"bucket/out/{name}")["LastModified"] for name in expected}
    assert [name for name in expected if after[name] != before[name]] == ["part-00004.parquet"]
    assert s3.cat_file("bucket/out/part-00004.parquet") == expected["part-00004.parquet"]
    # Another content under the same name has another tag.
    s3.pipe_file("bucket/in/a.txt", b"one\n" * 600)
    assert "s3://bucket/in/a.txt has changed" in refused(model, "s3://bucket/in", "s3://bucket/out", SETTINGS)
    encode(model, "s3://bucket/in/b.jsonl", "s3://bucket/one.parquet", SETTINGS)
    with s3.open("bucket/one.parquet") as file:
        assert parquet.read_table(file)["text"].to_pylist() == TEXTS[600:900]


def test_the_endpoint_of_fsspec_itself(model, source, s3, monkeypatch):
    import fsspec.config

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", endpoint)
    # Read once, when fsspec is imported.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    type(s3).clear_instance_cache()
    s3.put_file(str(source / "a.txt"), "bucket/a.txt")
    assert encode(model, "s3://bucket/a.txt", "s3://bucket/out/", SETTINGS)["texts"] == 600


def test_mistakes_with_a_store_are_one_line(model, source, s3, monkeypatch):
    local = str(source / "a.txt")
    assert "no such file: 's3://bucket/none.txt'" in refused(model, "s3://bucket/none.txt", "s3://bucket/out", SETTINGS)
    message = refused(model, local, "s3://nobucket/out", SETTINGS)
    assert "cannot write 's3://nobucket/out/_manifest.json': no such bucket" in message
    assert "no such file" in refused(model, "s3://nobucket/a.txt", "s3://bucket/out", SETTINGS)
    type(s3).clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    message = refused(model, local, "s3://bucket/out", SETTINGS)
    assert "no credentials; set AWS_ACCESS_KEY_ID" in message and "s3://bucket/out" in message
    assert "no credentials" in refused(model, "s3://bucket/a.txt", "s3://bucket/out", SETTINGS)


def test_a_store_whose_library_is_not_there(model, source, monkeypatch):
    def missing(url, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("lusifer.storage.url_to_fs", missing)
    assert "s3:// needs s3fs: pip install 'lusifer[remote]'" in refused(model, "s3://b/a.txt", "out")


# -------------------------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def cluster(server):
    """A Ray cluster of this machine, as large as wanted whatever the machine has; knows the server."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield ray
    ray.shutdown()


def test_ray_makes_the_shards_of_one_process(cluster, model, source, s3, tmp_path):
    settings = replace(SETTINGS, output_dtype="int8")
    for path in source.iterdir():
        s3.put_file(str(path), f"bucket/in/{path.name}")
    expected = encode(model, str(source), str(tmp_path / "one"), settings, threads=1)
    facts = encode(model, "s3://bucket/in", "s3://bucket/out", settings, threads=1, engine="ray", processes=2)
    assert {**facts, "output": ""} == {**expected, "output": ""}
    one = shards(tmp_path / "one")
    assert {name: s3.cat_file(f"bucket/out/{name}") for name in one} == one
    # What Ray began, one process may finish.
    manifest = json.loads(s3.cat_file("bucket/out/_manifest.json"))
    s3.pipe_file("bucket/out/_manifest.json", json.dumps({**manifest, "complete": False}).encode())
    s3.rm_file("bucket/out/part-00002.parquet")
    encode(model, "s3://bucket/in", "s3://bucket/out", settings, threads=1)
    assert s3.cat_file("bucket/out/part-00002.parquet") == one["part-00002.parquet"]


def title(process):
    """What a process calls itself; nothing if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_workers_of_ray_may_be_killed_and_finish_what_one_process_began(cluster, model, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(some_texts(4_000)))
    settings, one, out = replace(SETTINGS, shard_rows=100), tmp_path / "one", tmp_path / "ray"
    encode(model, str(tmp_path / "in.txt"), str(one), settings, threads=1)
    expected = content(one)
    shutil.copytree(one, out)
    manifest = json.loads((out / "_manifest.json").read_text())
    (out / "_manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    for path in sorted(out.glob("part-*"))[2:]:
        path.unlink()
    killed = []

    def kill():
        """Kills whoever is at work, each time some shards more are there."""
        for wanted in (4, 10):
            while len(list(out.glob("part-*"))) < wanted:
                time.sleep(0.005)
            workers = [
                process for process in psutil.Process().children(recursive=True) if "MapWorker" in title(process)
            ]
            victims = sorted(workers, key=lambda process: process.pid)
            for process in victims[: 2 if wanted == 10 else 1]:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    facts = encode(model, str(tmp_path / "in.txt"), str(out), settings, threads=1, engine="ray", processes=2)
    thread.join(timeout=10)
    assert len(killed) >= 2 and facts["texts"] == 4_000
    assert content(out) == expected


def test_mistakes_in_the_cluster_are_one_line(cluster, model, source, tmp_path):
    out = str(tmp_path / "out")
    message = refused(model, str(source), out, replace(SETTINGS, dim=1000), engine="ray")
    assert message == "cannot truncate embeddings to 1000 dimensions: the model has 48"
    assert "need a folder" in refused(model, str(source), str(tmp_path / "v.npy"), engine="ray")
    assert "--device is cpu or cuda" in refused(model, str(source), str(tmp_path / "o"), engine="ray", device="cuda:0")
