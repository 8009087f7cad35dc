"""Tag files as other programs write them, what is near to one, and classes.txt."""

import time

import pytest

from lcrf_jax.data.files import names
from lcrf_jax.data.files.tags import columns_not_read, looks_like_tags, read_classes, read_tag_file
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.listing import scan_folder

ROWS = {"a.jpg": ("ring",), "b.jpg": ("ring", "star"), "c.jpg": ()}


@pytest.mark.parametrize(
    "text, ignored",
    [
        (",image,tags\n0,a.jpg,ring\n1,b.jpg,ring;star\n2,c.jpg,\n", ""),
        ("Unnamed: 0,Image,Tags\n0,a.jpg,ring\n1,b.jpg,ring;star\n2,c.jpg,\n", ""),
        ("tags,image\nring,a.jpg\nring;star,b.jpg\n,c.jpg\n", ""),
        ("filename,label\na.jpg,ring\nb.jpg,ring;star\nc.jpg,\n", ""),
        ("path;labels\na.jpg;ring\nb.jpg;ring,star\nc.jpg;\n", ""),
        ("image,tag\na.jpg,ring\nb.jpg,ring;star\nc.jpg,\n", ""),
        ("image,width,tags,split\na.jpg,7,ring,train\nb.jpg,7,ring;star,val\nc.jpg,8,,\n", "columns that are not read: width, split"),
        ("file\tsplit\tTAGS\na.jpg\tx\tring\nb.jpg\tx\tring;star\nc.jpg\tx\t\n", "columns that are not read: split"),
    ],
)
def test_columns_go_by_their_names(tmp_path, text, ignored):
    path = tmp_path / "tags.csv"
    path.write_text(text)
    assert {image: row.tags for image, row in read_tag_file(path).items()} == ROWS
    assert columns_not_read(path) == (f"tags.csv: {ignored}" if ignored else "")
    for name in ROWS:
        (tmp_path / name).touch()
    assert ignored in scan_folder(tmp_path).not_taken


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tags.csv", "image,tags\na,ring\na,star\n", "line 3: 'a' has other tags than on line 2; join them in one row: ring;star"),
        ("tags.csv", "image,ring,star\na,1,0\n", "line 1: expected the header 'image,tags', got 'image,ring,star'"),
        ("tags.csv", "file,path,tags\na,b,ring\n", "line 1: expected the header 'image,tags', got 'file,path,tags'"),
        ("tags.csv", "image,split,tags\na,train\n", r"line 2: expected 'the 3 columns of the header', got 2 column\(s\)"),
        ("tags.csv", "image,tags\n", "tags.csv names no photograph; write one row or entry a photograph"),
        ("tags.json", "{}", "tags.json names no photograph"),
        ("tags.json", "[]", "tags.json names no photograph"),
        ("tags.jsonl", "\n", "tags.jsonl names no photograph"),
    ],
)
def test_tag_files_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tag_file(tmp_path / name)


def test_one_object_is_one_photograph(tmp_path):
    (tmp_path / "tags.json").write_text('{"image": "a.jpg", "tags": ["ring", "star"]}')
    assert {image: row.tags for image, row in read_tag_file(tmp_path / "tags.json").items()} == {"a.jpg": ("ring", "star")}


def test_whole_paths_within_the_folder(tmp_path):
    for name in ("one/a.jpg", "two/a.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "tags.csv").write_text(f"image,tags\n{tmp_path}/one/a.jpg,ring\n{tmp_path}/two/a.jpg,star\n")
    (tmp_path / "val.txt").write_text(f"{tmp_path}/two/a.jpg\n")
    assert FolderSource(tmp_path, "train").names == ("one/a.jpg",) and FolderSource(tmp_path, "val").names == ("two/a.jpg",)
    (tmp_path / "tags.csv").write_text("image,tags\n/elsewhere/one/a.jpg,ring\n")
    with pytest.raises(ValueError, match="there is no photograph '/elsewhere/one/a.jpg'"):
        FolderSource(tmp_path, "train", missing_images="error")


@pytest.mark.parametrize(
    "name", ["labels.csv", "Labels.CSV", "metadata.csv", "annotations.json", "tags (1).csv", "tags.csv.txt", ".tags.csv.icloud",
             "image_labels.tsv", "train.csv", "metadata.jsonl"],
)  # fmt: skip
def test_a_file_that_may_hold_the_tags_is_a_problem_where_folders_would_be_classes(tmp_path, name):
    for folder in ("site1", "site2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").touch()
    (tmp_path / name).write_text("image,tags\na.jpg,ring\n")
    [problem] = scan_folder(tmp_path).problems
    assert f"holds no tag file, but {name}: if it holds the tags, name it tags.csv" in problem and "(site1, site2)" in problem
    (tmp_path / "classes.txt").write_text("background\nsite1\nsite2\n")
    assert not scan_folder(tmp_path).problems


def test_files_that_hold_no_tags(tmp_path):
    (tmp_path / "sizes.csv").write_text("image,width\na,7\n")
    for name in ("sizes.csv", "predictions.json", "labels.txt", "README.md", "vintages.csv", "gone.csv"):
        assert not looks_like_tags(tmp_path / name), name


@pytest.mark.parametrize(
    "text, message",
    [
        ("background\n# animals\ncat\n", "line 2: '# animals' looks like a comment; the line number is the index in the masks"),
        ("# background first\nbackground\ncat\n", "line 1: '# background first' looks like a comment"),
        ("background\ncat\ncat\n", "line 3: the class 'cat' occurs twice, first on line 2"),
        ("background\ncat\nBackground\n", "line 3: the class 'background' occurs twice, first on line 1"),
        ("\n".join(map(str, range(40_000))), "expected 2 to 255 classes with background, got 40000"),
    ],
)
def test_lists_of_classes_that_are_refused(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classes.txt")
    assert time.process_time() - begin < 1


def test_background_may_be_written_in_capitals(tmp_path):
    (tmp_path / "classes.txt").write_text("Background\ncat\nC#\n")
    assert read_classes(tmp_path / "classes.txt") == ("background", "cat", "C#")


@pytest.mark.parametrize("text", [
    'image,tags\n"a.jpg,ring"\n', '"image,tags"\n"a.jpg,ring"\n', 'image;tags\n"a.jpg;ring"\n', '"image\ttags"\na.jpg\tring\n',
    'image,tags\n"a.jpg,ring",\n', '"image,tags"\na.jpg,ring\n',
])  # fmt: skip
def test_lines_that_are_quoted_as_a_whole_are_refused(tmp_path, text):
    path = tmp_path / "tags.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tags.csv, line \d: the whole line stands in quotes .*; remove them"):
        read_tag_file(path)


@pytest.mark.parametrize("text", ["image;tags\na.jpg;ring 0,9\n", "image\ttags\na.jpg\tstar:0,25,ring:0,9\n"])
def test_scores_with_a_decimal_comma_are_no_tags(tmp_path, text):
    path = tmp_path / "tags.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="line 2: .* looks like tags with scores; write names alone"):
        read_tag_file(path)


@pytest.mark.parametrize("form", ["{} 0.9", "{}:0.9", "{}: 0.93", "{} (0.5)", "{}=1.0", "{} .9", "{}_0.87", "{} 95%", "{}0.9"])
def test_tags_with_scores_are_a_problem_and_no_classes(tmp_path, form):
    (tmp_path / "tags.csv").write_text("image,tags\n" + "".join(f"{n}.jpg,{form.format(tag)}\n" for n, tag in enumerate(("ring", "star"))))
    for n in range(2):
        (tmp_path / f"{n}.jpg").touch()
    problems = scan_folder(tmp_path).problems
    assert len(problems) == 2 and "looks like a score; write its name alone ('ring')" in problems[0], problems
    (tmp_path / "classes.txt").write_text("background\nring\nstar\n")
    assert "unknown class" in scan_folder(tmp_path).problems[0] and "looks like a score" in scan_folder(tmp_path).problems[0]


@pytest.mark.parametrize("score", ["0.9", ".25", "1.0", "95 %"])
def test_a_score_is_no_tag(score):
    assert "looks like a score; leave it out" in names.name_doubt(score, ["ring", score])


@pytest.mark.parametrize("name, text", [
    ("tags.json", '[{"image": "a.jpg", "tags": ["ring"], "scores": [0.2]}]'),
    ("tags.jsonl", '{"image": "a.jpg", "tags": ["ring"], "scores": [0.2]}\n{"image": "b.jpg", "tags": []}\n'),
    ("tags.json", '{"image": "a.jpg", "tags": ["ring"], "scores": [0.2]}'),
])  # fmt: skip
def test_names_in_json_that_are_not_read_are_told(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert columns_not_read(tmp_path / name) == f"{name}: columns that are not read: scores"
    (tmp_path / name).write_text('{"image": ["ring"], "tags": [], "x.jpg": []}')  # three photographs
    assert columns_not_read(tmp_path / name) == ""


def test_names_that_end_with_numbers_have_no_score():
    for name in ("PM 2.5", "part 1", "part 10", "chanel no.5", "F16", "boeing 737", "7.62 mm", "C-130", "class 1.5", "7", "1", "0", "100"):
        assert not names._SCORE.fullmatch(name), name


@pytest.mark.parametrize("name, where", [("tags.json", ""), ("tags.jsonl", ", line 1")])
@pytest.mark.parametrize("value, message", [("9" * 5000, "a number of thousands of digits"), ("[" * 100_000, "too many lists")], ids=["long", "deep"])
def test_json_that_python_refuses_names_its_file(tmp_path, name, where, value, message):
    path = tmp_path / name
    path.write_text('{"a.jpg": ' + value + "}")
    with pytest.raises(ValueError, match=rf"^{path}{where}: not JSON \(it has {message}.*\); correct it"):
        read_tag_file(path)
