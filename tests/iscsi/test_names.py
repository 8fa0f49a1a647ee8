import unicodedata
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import FormatError
from iscsifuse.iscsi.names import make_initiator_name, printable, validate_iscsi_name


@pytest.mark.parametrize(
    "name",
    [
        "iqn.2001-04.com.example",
        "iqn.2001-04.com.example:storage:diskarrays-sn-a8675309",
        "iqn.1992-05.com.emc:bb0050568c51390000-2",
        "iqn.2012-12.com.Example:Disk_1",
        "iqn.2001-04.com.example:größe",
        "iqn.2001-04.com.example:磁盘",
        "iqn.2001-04.com.example:" + "x" * (223 - 24),
        "eui.02004567A425678D",
        "naa.52004567BA64678D",
        "naa.62004567BA64678D0123456789ABCDEF",
    ],
)
def test_good_names(name: str) -> None:
    assert validate_iscsi_name(name) == name


@pytest.mark.conformance("B6")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "no iSCSI name"),
        (".", "no iSCSI name"),
        ("..", "'..'"),
        ("disk", "no iSCSI name"),
        ("iqn.2001-13.com.example", "no iSCSI name"),
        ("iqn.201-04.com.example", "no iSCSI name"),
        ("iqn.2001-04.", "no iSCSI name"),
        ("iqn.2001-04..example", "'..'"),
        ("iqn.2001-04.com.example:..", "'..'"),
        ("iqn.2001-04.com.example:a/b", r"U\+002F"),
        ("../../etc/passwd", r"U\+002F"),
        ("iqn.2001-04.com.example:a b", r"U\+0020"),
        ("iqn.2001-04.com.example:\n", r"U\+000A"),
        ("iqn.2001-04.com.example:a\0", r"U\+0000"),
        ("iqn.2001-04.com.example:\x1b[2J", r"U\+001B"),
        ("iqn.2001-04.com.example:\\xf6", r"U\+005C"),
        ("iqn.2001-04.com.example:$(id)", r"U\+0024"),
        ("iqn.2001-04.com.example:\u202e", r"U\+202E"),  # right-to-left override
        ("iqn.2001-04.com.example:\u200b", r"U\+200B"),  # a blank without width
        ("iqn.2001-04.com.example:\u00ad", r"U\+00AD"),  # soft hyphen: stringprep drops it
        ("iqn.2001-04.com.example:\u00a0", r"U\+00A0"),
        ("iqn.2001-04.com.example:\u05d0", r"U\+05D0"),  # right-to-left letter
        ("iqn.2001-04.com.example:\u3002", r"U\+3002"),
        ("iqn.2001-04.com.example:\ue000", r"U\+E000"),
        ("iqn.2001-04.com.example:\udc80", r"U\+DC80"),
        ("iqn.2001-04.com.example:\x85", r"U\+0085"),
        ("iqn.2001-04.com.example:\U000e0041", r"U\+E0041"),
        ("iqn.2001-04.com.example:\U0001f600", r"U\+1F600"),  # unassigned in Unicode 3.2
        ("iqn.2001-04.com.example:o\u0308", "NFKC"),
        ("iqn.2001-04.com.example:\ufb01", "NFKC"),
        ("iqn.2001-04.com.example:" + "x" * (224 - 24), "224 bytes"),
        ("iqn.2001-04.com.example:" + "ö" * 100, "224 bytes"),
        ("x" * 100_000, "100000 bytes"),
        ("eui.02004567A425678", "no iSCSI name"),
        ("eui.02004567A425678G", "no iSCSI name"),
        ("naa.52004567BA64678D0", "no iSCSI name"),
        ("IQN.2001-04.com.example", "no iSCSI name"),
    ],
)
def test_bad_names(name: str, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint) as caught:
        validate_iscsi_name(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.conformance("B6")
@given(st.text(max_size=30).map(lambda rest: "iqn.2001-04.com.example" + rest) | st.text(max_size=40))
def test_a_good_name_is_one_component_of_a_path_and_safe_to_show(name: str) -> None:
    try:
        validate_iscsi_name(name)
    except FormatError:
        return
    assert PurePosixPath(name).parts == (name,)
    assert name not in (".", "..")
    assert printable(name) == name
    assert not any(unicodedata.bidirectional(character) in ("R", "AL") for character in name)


@pytest.mark.conformance("B6")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, größer", "plain text, größer"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\x7f\x80\x9b", "\\x7f\\x80\\x9b"),
        ("\udc80\ue000\u2028", "\\udc80\\ue000\\u2028"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_printable_ends_somewhere() -> None:
    assert printable("abcdef", limit=6) == "abcdef"
    assert printable("abcdefg", limit=6) == "abcdef..."
    assert len(printable("x" * 1_000_000)) < 2000


@given(st.text())
def test_whatever_comes_out_is_printable(text: str) -> None:
    assert printable(text).isprintable()


def test_make_initiator_name() -> None:
    machine_id = "0123456789abcdef0123456789abcdef"
    name = make_initiator_name(machine_id)
    assert name == "iqn.2026-11.io.github.iscsifuse:34ea6e69a9ef"
    assert validate_iscsi_name(name) == name
    assert make_initiator_name(machine_id + "\n") == name
    assert make_initiator_name("other") != name
    assert make_initiator_name("\udcff") != name
