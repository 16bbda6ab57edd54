"""Flickr30k Entities as published: phrases in brackets, boxes in XML."""

import pytest

from uniter.datasets.errors import BadInput

SENTENCES = (
    "[/EN#1/people Two young guys] with [/EN#3/bodyparts shaggy hair] stand in [/EN#2/scene the yard] .\n"
    "[/EN#1/people/clothing Men] look at [/EN#0/notvisual it] ; [/EN#9/other a lamp] hangs .\n"
)
XML = """<annotation><filename>1000092795.jpg</filename>
<size><width>333</width><height>500</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>19</xmax><ymax>39</ymax></bndbox></object>
<object><name>1</name><name>3</name><bndbox><xmin>100</xmin><ymin>20</ymin><xmax>101</xmax><ymax>20</ymax></bndbox></object>
<object><name>2</name><scene>1</scene><nobox>0</nobox></object></annotation>"""


@pytest.fixture
def entities(tmp_path):
    def make(xml=XML, sentences=SENTENCES, listed="1000092795\n"):
        for folder, name, text in (("Annotations", "1000092795.xml", xml), ("Sentences", "1000092795.txt", sentences)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(text)
        (tmp_path / "test.txt").write_text(listed)
        return tmp_path / "test.txt"

    return make


def test_phrases_with_their_boxes(entities, read, tmp_path):
    examples, counts = read("flickr30k-entities", entities())
    assert [(one.id, one.text) for one in examples] == [
        ("1000092795-0-0", "Two young guys"),
        ("1000092795-0-1", "shaggy hair"),
        ("1000092795-1-0", "Men"),
    ]
    first = examples[0]
    assert first.image == "1000092795.jpg" and first.origins == (("flickr", "1000092795"),)
    assert first.fields["boxes"] == [[10, 20, 10, 20], [100, 20, 2, 1]] and first.fields["size"] == (500, 333)
    assert first.fields["sentence"] == "Two young guys with shaggy hair stand in the yard ."
    assert examples[1].fields["boxes"] == [[100, 20, 2, 1]] and examples[2].fields["kinds"] == ["people", "clothing"]
    assert counts["phrases_without_box"] == 3
    elsewhere = tmp_path / "lists" / "test.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text("1000092795\n")
    assert [one.id for one in read("flickr30k-entities", elsewhere, join=[tmp_path])[0]] == [one.id for one in examples]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"listed": "\n"}, "lists no photograph"),
        ({"listed": "../etc/passwd\n"}, "line 1 of .*test.txt is '../etc/passwd'; expected the number of a photograph"),
        ({"listed": "77\n"}, "Annotations/77.xml is not there"),
        ({"xml": XML[:300]}, "1000092795.xml is no readable XML"),
        ({"xml": ""}, "1000092795.xml is empty, larger"),
        ({"xml": '<!DOCTYPE a [<!ENTITY b "c">]>' + XML}, "declares entities"),
        ({"xml": XML.replace("<xmax>19", "<xmax>9")}, "has the box 10, 20, 9, 39; expected xmin"),
        ({"xml": XML.replace("<xmin>10", "<xmin>ten")}, "says 'ten' where a whole number of pixels is expected"),
        ({"xml": XML.replace("<width>333", "<width>0")}, "500 pixels high and 0 wide"),
    ],
)
def test_damaged_files_are_said(changed, said, entities, read):
    with pytest.raises(BadInput, match=said):
        read("flickr30k-entities", entities(**changed))


def test_a_folder_without_annotations_is_said(tmp_path, read):
    (tmp_path / "test.txt").write_text("1\n")
    with pytest.raises(BadInput, match=r"holds no folder Annotations; unpack annotations\.zip"):
        read("flickr30k-entities", tmp_path / "test.txt")
