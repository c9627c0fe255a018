"""Rows to documents on disk: chats beside TRL (`prepare`), and the memory of a large set (`memory`)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import corpus
from benchmarks.measure import Call, Numbers, Result, cpu_seconds, in_turn, medians, peak_bytes

GIBIBYTE = 2**30


def prepare(
    work: Path,
    *,
    call: Call,
    size: int = 5_000,
    repetitions: int = 5,
    num_characters: int | None = None,
) -> Result:
    """`size` chats from JSONL to token ids and masks on disk, by one process."""
    call(corpus.write_chats, folder=work, num_rows=size, seed=0, num_characters=num_characters)
    chats, tokenizer = work / "chats.jsonl", work / "tokenizer"
    _first_line(chats, work / "one.jsonl")
    runs = iter(range(3 * repetitions))

    def of(measurement: Any) -> Numbers:
        scratch = work / f"scratch-{next(runs)}"
        scratch.mkdir()
        return call(measurement, chats=chats, tokenizer_folder=tokenizer, scratch=scratch)

    samples = in_turn(
        repetitions,
        peer=partial(of, _peer_rows),
        ours=partial(of, _our_rows),
        encoder=partial(of, _encoder),
    )
    counts = call(_compare, peer=work / "scratch-0", ours=work / "scratch-1")
    peer, ours, encoder = (medians(samples[name]) for name in ("peer", "ours", "encoder"))
    ratio, bar = peer["cpu_seconds"] / ours["cpu_seconds"], 2.0
    return Result(
        peer=peer,
        ours=ours,
        ratio=ratio,
        bar=bar,
        promises={"CPU time": ratio >= bar, "equal tokens and masks": counts["equal"]},
        repetitions=repetitions,
        compared=(
            f"The same {size:,} chats (prose and code of the standard library, half of them with "
            "thoughts) from JSONL to token ids and train masks on disk, one process, same tokenizer and "
            "template. Passages are drawn from 6.5 million characters, so that words recur more than in "
            "chats. Peer: datasets.load_dataset and the construction of TRL's SFTTrainer "
            "(assistant_only_loss, no length limit, no packing), less the construction over one row. "
            "Ours: prepare() with an empty cache, the index of packs included. Imports and a first run "
            "over one row are left out of both. encoder_cpu_seconds: encode_batch_fast of tokenizers "
            "over the rendered texts, alone."
        ),
        samples=samples,
        extra={**counts, "encoder_cpu_seconds": encoder["cpu_seconds"]},
    )


def _first_line(path: Path, target: Path) -> None:
    with path.open(encoding="utf-8") as stream:
        target.write_text(stream.readline(), encoding="utf-8")


def _peer_rows(chats: Path, tokenizer_folder: Path, scratch: Path) -> Numbers:
    """TRL's construction of a trainer over all rows, less that over one row; keeps scratch/rows."""
    import datasets
    from transformers import AutoTokenizer, SmolLM3Config, SmolLM3ForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = f"{{%- set date_string = '{corpus.DATE}' -%}}" + tokenizer.chat_template
    end = tokenizer.eos_token_id
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    model = SmolLM3ForCausalLM(SmolLM3Config(**shape, **heads, **ends))

    def construct(rows: Path, name: str) -> Any:
        arguments = SFTConfig(
            output_dir=str(scratch / "out"),
            assistant_only_loss=True,
            max_length=None,
            packing=False,
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        loaded = datasets.load_dataset(
            "json", data_files=str(rows), split="train", cache_dir=str(scratch / name)
        )
        return SFTTrainer(model=model, args=arguments, train_dataset=loaded, processing_class=tokenizer)

    construct(chats.with_name("one.jsonl"), "warm")
    numbers: Numbers = {}
    with cpu_seconds(numbers, "one_row_cpu_seconds"):
        construct(chats.with_name("one.jsonl"), "one")
    with cpu_seconds(numbers):
        trainer = construct(chats, "all")
    numbers["cpu_seconds"] -= numbers.pop("one_row_cpu_seconds")
    trainer.train_dataset.save_to_disk(scratch / "rows")
    return numbers


def _our_rows(chats: Path, tokenizer_folder: Path, scratch: Path) -> Numbers:
    """Our preparation with an empty cache; keeps scratch/documents."""
    our_preparation(chats.with_name("one.jsonl"), tokenizer_folder)(scratch / "warm")
    prepare_all = our_preparation(chats, tokenizer_folder)
    numbers: Numbers = {}
    with cpu_seconds(numbers):
        made = prepare_all(scratch / "cache")
    (scratch / "documents").symlink_to(made.stores[0].folder.resolve(), target_is_directory=True)
    return numbers


def our_preparation(rows: Path, tokenizer_folder: Path) -> Callable[[Path], Any]:
    """The preparation of a file of rows for SFT, tokenizer loaded: a function of the cache's folder."""
    from smol_post import data, vocabulary
    from smol_post.config import SftRecipe, Source

    recipe = SftRecipe(
        stage="sft",
        max_tokens=65_536,
        global_batch_size=1,
        num_epochs=1.0,
        date_string=corpus.DATE,
        sources=[Source(name="rows", path=str(rows.resolve()))],
    )
    tokenizer = vocabulary.load_tokenizer(tokenizer_folder)
    words = vocabulary.of_run(recipe, tokenizer, folder=rows.parent)
    return lambda cache_dir: data.prepare(recipe, words, folder=rows.parent, cache_dir=cache_dir)


def _encoder(chats: Path, tokenizer_folder: Path, scratch: Path) -> Numbers:
    """The encoder of `tokenizers` alone, over the rendered chats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = [
        tokenizer.apply_chat_template(
            row["messages"], tokenize=False, date_string=corpus.DATE, **row["chat_template_kwargs"]
        )
        for row in corpus.read_jsonl(chats)
    ]
    numbers: Numbers = {}
    with cpu_seconds(numbers):
        tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return numbers


def _compare(peer: Path, ours: Path) -> dict[str, Any]:
    """Counts of what both made alike; ValueError at the first row whose token ids or mask differ."""
    import datasets
    import numpy as np

    from smol_post.documents import Store

    theirs = datasets.load_from_disk(peer / "rows").with_format("numpy")
    store = Store(ours / "documents")
    counts = {"num_rows": len(theirs), "num_tokens": 0, "num_trained_tokens": 0}
    if len(theirs) != len(store.records):
        raise ValueError(f"the peer made {len(theirs)} documents, we {len(store.records)}")
    for number, record in enumerate(store.records):
        tokens = store.tokens[record["address"] : record["address"] + record["length"]]
        row = theirs[number]
        ids, mask = np.where(tokens < 0, ~tokens, tokens), tokens >= 0
        if not (np.array_equal(ids, row["input_ids"]) and np.array_equal(mask, row["labels"] != -100)):
            raise ValueError(f"row {number + 1}: token ids or masks differ")
        counts["num_tokens"] += len(ids)
        counts["num_trained_tokens"] += int(mask.sum())
    return {"equal": True, **counts}


def memory(
    work: Path,
    *,
    call: Call,
    size: int = 1_000_000,
    repetitions: int = 1,
    num_characters: int | None = None,
) -> Result:
    """The most memory that the preparation of `size` short texts takes, and of a fifth of them."""
    call(corpus.write_tokenizer, folder=work, num_characters=num_characters)
    fifth = size // 5
    for name, num_rows in (("all", size), ("fifth", fifth)):
        path = work / f"{name}.jsonl"
        call(corpus.write_short_texts, path=path, num_rows=num_rows, seed=0, num_characters=num_characters)
    runs = iter(range(2 * repetitions))

    def of(name: str) -> Numbers:
        scratch = work / f"scratch-{next(runs)}"
        return call(
            _our_peak, rows=work / f"{name}.jsonl", tokenizer_folder=work / "tokenizer", scratch=scratch
        )

    samples = in_turn(repetitions, ours=partial(of, "all"), fifth=partial(of, "fifth"))
    ours, bar = medians(samples["ours"]), 1.0
    ratio = 2 * GIBIBYTE / ours["peak_bytes"]
    return Result(
        peer={},
        ours=ours,
        ratio=ratio,
        bar=bar,
        promises={"at most 2 GiB": ratio >= bar},
        repetitions=repetitions,
        compared=(
            "No peer: the ratio is 2 GiB over the most resident memory (ru_maxrss) of a fresh process "
            f"that prepares {size:,} texts of about 20 tokens from JSONL to documents and packs on disk. "
            "start_bytes is what it had before, libraries and tokenizer loaded; fifth is the same with "
            f"{fifth:,} texts."
        ),
        samples=samples,
        extra={"fifth": medians(samples["fifth"])},
    )


def _our_peak(rows: Path, tokenizer_folder: Path, scratch: Path) -> Numbers:
    scratch.mkdir()
    _first_line(rows, scratch / "one.jsonl")
    our_preparation(scratch / "one.jsonl", tokenizer_folder)(scratch / "warm")
    prepare_all = our_preparation(rows, tokenizer_folder)
    numbers: Numbers = {"start_bytes": peak_bytes()}
    with cpu_seconds(numbers):
        made = prepare_all(scratch / "cache")
    numbers["peak_bytes"] = peak_bytes()
    numbers["growth_bytes"] = numbers["peak_bytes"] - numbers["start_bytes"]
    return {**numbers, "num_documents": made.ledger["num_documents"], "num_tokens": made.ledger["num_tokens"]}
