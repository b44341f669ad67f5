"""Faults of configs, data and hostile files, and rows that name the unit tests that try them."""

import subprocess
import sys

from tests.faults.lab import ROOT, assert_error, row, steps

TESTS = {
    "P17": (
        "what the first process does alone at the end may take long: the others wait for it",
        "tests/test_distributed.py::test_all_wait_at_the_end_for_what_the_first_does_alone",
        "tests/test_distributed.py::test_who_waits_for_the_first_hears_that_it_died",
    ),
    "T3": (
        "a batch that does not divide is refused before anything is compiled, with what would fit",
        "tests/test_sharding.py::test_a_batch_that_does_not_divide_is_refused_with_those_that_would",
        "tests/test_loop.py::test_a_bad_config_is_refused_before_anything_is_written",
    ),
    "T4": (
        "initial parameters have the same fingerprint on any mesh",
        "tests/test_sharding.py::test_all_noise_is_the_same_on_any_mesh",
    ),
    "T8": (
        "unknown keys, wrong types, values out of range: the nearest key, nothing on disk",
        "tests/test_cli.py::test_bad_input_gets_one_clear_error",
        "tests/test_loop.py::test_a_bad_config_is_refused_before_anything_is_written",
    ),
    "D1": (
        "files that are no sound picture keep their slot with weight 0",
        "tests/test_transforms.py::test_what_is_no_sound_picture_is_a_bad_example_with_a_kind",
        "tests/test_loader.py::test_a_broken_example_keeps_its_slot_and_moves_nobody",
        "tests/test_sources.py::test_a_loader_goes_on_past_a_folders_broken_files",
    ),
    "D2": (
        "decompression bombs are refused from the header",
        "tests/test_transforms.py::test_bombs_are_refused_from_the_header",
    ),
    "D5": (
        "any caption becomes a row of tokens in bounded time",
        "tests/test_text.py::test_any_caption_becomes_a_row",
        "tests/test_text.py::test_a_million_characters_take_bounded_time",
    ),
    "D6": (
        "damaged shards are found at the start, a flipped bit costs one record",
        "tests/test_sources.py::test_a_damaged_shard_is_found_at_the_start",
        "tests/test_sources.py::test_a_flipped_bit_costs_one_record",
    ),
    "D8": (
        "a missing feature is an error that says what there is",
        "tests/test_sources.py::test_tfds_errors_say_what_there_is",
    ),
    "D14": (
        "examples held out are never trained on, and the judge passes over broken ones",
        "tests/test_sources.py::test_train_and_test_share_no_picture",
        "tests/test_evaluation.py::test_broken_pictures_are_left_out_of_the_held_out_loss",
    ),
    "X1": (
        "files that can run code are refused, and nothing of a checkpoint runs",
        "tests/test_text.py::test_files_that_can_run_code_are_refused",
        "tests/test_text.py::test_opening_a_checkpoint_runs_nothing_of_it",
    ),
    "X2": (
        "hostile safetensors are named errors",
        "tests/test_text.py::test_a_damaged_file_is_named",
        "tests/test_text.py::test_a_file_that_could_run_code_is_named",
        "tests/test_text.py::test_an_index_reads_no_other_folder",
    ),
    "X14": (
        "a config of a huge network is refused before anything is built",
        "tests/test_opening.py::test_a_config_of_a_huge_network_is_refused_at_once",
        "tests/test_opening.py::test_a_text_encoder_of_no_sensible_size_is_refused_at_once",
        "tests/test_opening.py::test_an_image_network_of_no_sensible_size_is_refused_at_once",
    ),
    "X15": (
        "a tokenizer.json that could take memory or time without end is a clear error",
        "tests/test_fast.py::test_only_regular_expressions_that_end_soon_are_read",
        "tests/test_fast.py::test_a_hostile_file_is_a_clear_error",
        "tests/test_fast.py::test_a_panic_of_the_library_is_a_clear_error",
        "tests/test_fast.py::test_no_file_of_a_tokenizer_is_read_that_is_too_large",
    ),
    "X16": (
        "tensors of whole numbers are no weights",
        "tests/test_opening.py::test_weights_of_whole_numbers_are_none",
    ),
    "X17": (
        "a model's config makes nobody ask the hub: only the user's own command does",
        "tests/test_opening.py::test_the_hub_is_asked_for_what_the_user_names_alone",
    ),
}


def _of_tests(names):
    def run(lab):
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *names]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        return done.stdout.splitlines()[-1].split(" in ")[0]

    return run


for _id, (_promise, *_names) in TESTS.items():
    row(_id, _promise, long=True)(_of_tests(_names))


@row(
    "T5",
    "a resume with another model, optimiser, decay or precision: refused with the difference",
    long=True,
)
def t5(lab):
    before = steps(lab.oracle)
    for flag, text in {
        "--config.model.model.width=32": "model.model.width: 16 → 32",
        "--config.optim.model.weight_decay=0.5": "optim.model.weight_decay",
        "--config.ema.model=0.5": "ema.model",
        "--config.model.model.dtype=bfloat16": "model.model.dtype",
        "--config.batch_size=16": "batch_size: 8 → 16",
        "--config.seed=4": "seed: 0 → 4",
    }.items():
        assert_error(lab.run(lab.oracle, flag), 78, text)
    assert steps(lab.oracle) == before
    folder = lab.folder()
    assert lab.run(folder, "--config.steps=4").code == 0
    allowed = ("--config.steps=8", "--config.optim.model.learning_rate=0.0005")
    ended = lab.run(folder, *allowed, "--config.save_every=2", "--config.strategy=fsdp", devices=2)
    assert ended.code == 0, ended.log[-2000:]
    assert "optim.model.learning_rate" in ended.log  # what changed is told


@row(
    "T6",
    "a resume with other data, order, image size or captions: refused with the difference",
    long=True,
)
def t6(lab):
    for flag, text in {
        "--config.data.size=65": "data.size: 64 → 65",
        "--config.res=20": "res: 16 → 20",
        "--config.text_length=8": "text_length: 16 → 8",
    }.items():
        assert_error(lab.run(lab.oracle, flag), 78, text)
    pictures, run = lab.folder(), lab.folder()
    _folder_of_pictures(pictures, 12)
    ended = lab.run(run, "--config.steps=2", folder=pictures)
    assert ended.code == 0, ended.log[-2000:]
    moved = lab.folder()
    pictures.rename(moved)
    ended = lab.run(run, "--config.steps=3", folder=moved)
    assert ended.code == 0, ended.log[-2000:]  # the same files elsewhere
    (moved / "00.txt").write_text("another caption")
    assert_error(lab.run(run, "--config.steps=4", folder=moved), 78, "trained on other data")


@row(
    "T9",
    "an exported model as workdir, or init_from nowhere: refused, nothing overwritten",
    long=True,
)
def t9(lab):
    folder = lab.folder()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"precious")
    assert_error(lab.run(folder), 78, "an exported model lies there")
    assert (folder / "model.safetensors").read_bytes() == b"precious"
    assert_error(lab.run(lab.folder(), "--config.init_from=/nowhere"), 78, "no such folder")


@row("D7", "5 % of broken pictures: exit 65 above the budget, with the reasons", long=True)
def d7(lab):
    pictures, run = lab.folder(), lab.folder()
    _folder_of_pictures(pictures, 40)
    for i in range(6):
        (pictures / f"{i:02d}.png").write_bytes(b"<html>")
    ended = lab.run(run, folder=pictures)
    assert_error(ended, 65, "examples are broken", "unreadable as PNG")


@row(
    "D13",
    "an odd folder trains: what is read is told in a line, a broken picture once and by name",
    long=True,
)
def d13(lab):
    pictures, run = lab.folder(), lab.folder()
    _folder_of_pictures(pictures, 12)
    (pictures / "03.png").write_bytes(b"<html>")
    (pictures / "04.txt").write_text(" \n")
    (pictures / "05.txt").unlink()
    (pictures / "anim.gif").write_bytes(b"GIF89a")
    (pictures / "gone.png").symlink_to("nothing.png")
    ended = lab.run(run, folder=pictures)  # 16 epochs
    assert ended.code == 0, ended.log[-2000:]
    line = "12 pictures, 11 of them used, with 11 captions; 1 without caption; not read: 1 .gif"
    for text in (line, "left out: 05.png", "left out: gone.png", "without condition: 04.png"):
        assert ended.log.count(text) == 1, (text, ended.log[-2000:])
    assert ended.log.count("is broken and counts nothing") == 1
    assert ended.log.count("in 03.png") == 1
    assert len((run / "quarantine.jsonl").read_text().splitlines()) > 10
    (pictures / "06.png").write_bytes(b"")
    for number in (7, 8):
        (pictures / f"{number:02d}.png").write_bytes(b"<html>")
    assert_error(lab.run(lab.folder(), folder=pictures), 65, "4 of", str(pictures / "07.png"))


def _folder_of_pictures(folder, count):
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
