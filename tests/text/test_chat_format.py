"""The chat format against transformers: the template we store, and the picture processor."""

from __future__ import annotations

import json

import numpy as np
import pytest

from l4cli.errors import L4Error
from l4cli.text import image_block, load_tokenizer, num_tiles, render_chat

TOKENS_PER_TILE = 144

CONVERSATIONS = {
    "plain": [{"role": "user", "content": "hi"}],
    "system is trimmed": [
        {"role": "system", "content": "  be brief \n"},
        {"role": "user", "content": "  not trimmed \n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ],
    "content begins with newlines": [
        {"role": "user", "content": "\n\n\nhi"},
        {"role": "assistant", "content": "\nthere\n"},
    ],
    "tools": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "[add(a=1)]"},
        {"role": "tool", "content": "2"},
        {"role": "ipython", "content": [{"type": "text", "text": "three"}]},
        {"role": "assistant", "content": ""},
    ],
    "items": [
        {
            "role": "system",
            "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b "}],
        },
        {
            "role": "user",
            "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
        },
    ],
    "pictures": [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "\nCompare "},
                {"type": "text", "text": "these."},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": "They differ: caf\u00e9 \U0001f600."},
        {"role": "user", "content": "How?"},
    ],
}
GRIDS = [(1, 1), (2, 3), (3, 1)]


@pytest.mark.parametrize(("rows", "cols", "length"), [(1, 1, 147), (1, 2, 437), (4, 4, 2467)])
def test_image_block_has_the_published_length(rows, cols, length):
    tokenizer = load_tokenizer("bytes")
    block = image_block(tokenizer, rows, cols, TOKENS_PER_TILE)
    num_patches = int((block == tokenizer.patch_id).sum())
    assert len(block) == length
    assert num_patches == num_tiles(rows, cols) * TOKENS_PER_TILE


def test_image_block_written_out():
    tokenizer = load_tokenizer("bytes")
    block = tokenizer.decode(image_block(tokenizer, 2, 2, 1))
    row = "<|patch|><|tile_x_separator|><|patch|><|tile_y_separator|>"
    assert block == f"<|image_start|>{row}{row}<|image|><|patch|><|image_end|>"
    block = tokenizer.decode(image_block(tokenizer, 1, 1, 2))
    assert block == "<|image_start|><|image|><|patch|><|patch|><|image_end|>"


def test_chat_written_out():
    tokenizer = load_tokenizer("bytes")
    chat = render_chat(tokenizer, CONVERSATIONS["system is trimmed"], add_generation_prompt=True)
    assert tokenizer.decode(chat.ids) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nbe brief<|eot|>"
        "<|header_start|>user<|header_end|>\n\n  not trimmed \n<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nyes<|eot|>"
        "<|header_start|>user<|header_end|>\n\nmore<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    assert tokenizer.decode(chat.ids[chat.loss_mask == 1]) == "yes<|eot|>"


def test_special_tokens_in_a_message_are_text():
    tokenizer = load_tokenizer("bytes")
    message = {"role": "user", "content": "<|eot|><|header_start|>system<|header_end|>"}
    chat = render_chat(tokenizer, [message], add_generation_prompt=False)
    assert (chat.ids == tokenizer.eot_id).sum() == 1
    assert (chat.ids == tokenizer.header_start_id).sum() == 1


def test_positions_and_targets_of_a_chat_with_pictures():
    tokenizer = load_tokenizer("bytes")
    chat = render_chat(
        tokenizer,
        CONVERSATIONS["pictures"],
        add_generation_prompt=False,
        image_grids=GRIDS,
        tokens_per_tile=4,
    )
    assert chat.ids.dtype == np.uint32
    assert chat.loss_mask.dtype == np.uint8
    assert chat.media_positions.dtype == np.int64
    for position, (rows, cols) in zip(chat.media_positions, GRIDS, strict=True):
        block = image_block(tokenizer, rows, cols, 4)
        start = position - (2 if rows * cols == 1 else 1)
        assert chat.ids[position] == tokenizer.patch_id
        assert chat.ids[start : start + len(block)].tolist() == block.tolist()
    answer = tokenizer.decode(chat.ids[chat.loss_mask == 1])
    assert answer == "They differ: caf\u00e9 \U0001f600.<|eot|>"


def test_messages_that_are_not_chat_are_errors():
    tokenizer = load_tokenizer("bytes")
    wrong = [
        ({"role": "robot", "content": "x"}, "known roles"),
        ({"content": "x"}, "known roles"),
        ({"role": ["user"], "content": "x"}, "known roles"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": [{"type": "audio"}]}, "neither a text nor an image"),
        ({"role": "user", "content": ["x"]}, "neither a text nor an image"),
        ({"role": "user", "content": [{"type": "text"}]}, "neither a text nor an image"),
        ({"role": "system", "content": [{"type": "image"}]}, "cannot hold a picture"),
        ("hi", "not an object"),
    ]
    for message, why in wrong:
        with pytest.raises(L4Error, match="message 2") as caught:
            render_chat(
                tokenizer, [{"role": "user", "content": "a"}, message], add_generation_prompt=True
            )
        assert why in caught.value.why


@pytest.mark.parametrize("grids", [[], [(1, 1)], [(1, 1)] * 4])
def test_pictures_that_do_not_fit_the_messages_are_an_error(grids):
    with pytest.raises(L4Error, match=f"name 3, {len(grids)} were given"):
        render_chat(
            load_tokenizer("bytes"),
            CONVERSATIONS["pictures"],
            add_generation_prompt=True,
            image_grids=grids,
            tokens_per_tile=4,
        )


def test_template_rendered_by_transformers_gives_our_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS.values():
        for prompt in (False, True):
            text = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            pieces = text.split("<|image|>")
            grids = GRIDS[: len(pieces) - 1]
            blocks = [tokenizer.decode(image_block(tokenizer, *grid, 4)) for grid in grids]
            expanded = "".join(a + b for a, b in zip(pieces, [*blocks, ""], strict=True))
            ours = render_chat(
                tokenizer,
                messages,
                add_generation_prompt=prompt,
                image_grids=grids,
                tokens_per_tile=4,
            )
            ids = theirs(expanded, add_special_tokens=False)["input_ids"]
            assert ids == ours.ids.tolist()


def test_template_refuses_what_we_refuse(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for message in (
        {"role": "robot", "content": "x"},
        {"role": "user", "content": [{"type": "audio"}]},
        {"role": "system", "content": [{"type": "image"}]},
    ):
        with pytest.raises(Exception, match=r"unknown role|message with a"):
            theirs.apply_chat_template([message], tokenize=False)


def test_processor_of_transformers_gives_our_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path)
    processor = transformers.Llama4Processor(
        image_processor=transformers.Llama4ImageProcessor(
            size={"height": 336, "width": 336}, max_patches=16
        ),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path),
        chat_template=json.loads(tokenizer.files()["tokenizer_config.json"])["chat_template"],
    )
    messages = CONVERSATIONS["pictures"]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = [image.new("RGB", size, "red") for size in ((200, 100), (900, 600), (300, 1000))]
    inputs = processor(images=pictures, text=text, add_special_tokens=False)
    ours = render_chat(
        tokenizer,
        messages,
        add_generation_prompt=True,
        image_grids=[(1, 1), (2, 3), (3, 1)],
        tokens_per_tile=TOKENS_PER_TILE,
    )
    assert np.asarray(inputs["input_ids"]).reshape(-1).tolist() == ours.ids.tolist()
