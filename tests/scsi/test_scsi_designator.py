from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.scsi.designator import Designator, best_designator


def _designator(kind: int, identifier: bytes | str, *, association: int = 0, code_set: int = 1) -> Designator:
    raw = bytes.fromhex(identifier) if isinstance(identifier, str) else identifier
    return Designator(association=association, designator_type=kind, code_set=code_set, identifier=raw)


NAA_6 = _designator(3, "6006048c003d7658f05d83da77e4a0dd")
NAA_5 = _designator(3, "5000c50012345678")
NAA_3 = _designator(3, "3000000100000001")
NAA_2 = _designator(3, "2000000100000001")
EUI = _designator(2, "0010a00012345678")
T10 = _designator(1, b"IET     00010001", code_set=2)
NAME = _designator(8, b"iqn.2001-04.com.example:disk,L,0x01\0", code_set=3)
UUID = _designator(10, "1000" + "ab" * 16)
MD5 = _designator(7, "0123456789abcdef0123456789abcdef")
VENDOR = _designator(0, b"anything", code_set=2)
PORT = _designator(4, "00000001", association=1)


@pytest.mark.parametrize(
    ("designator", "text"),
    [
        (NAA_6, "naa.6006048c003d7658f05d83da77e4a0dd"),
        (EUI, "eui.0010a00012345678"),
        (T10, "t10.IET 00010001"),
        (_designator(1, "49455420202020200a0b"), "t10.49455420202020200a0b"),
        (NAME, "name iqn.2001-04.com.example:disk,L,0x01"),
        (_designator(8, b"iqn.x\n\x1b[2J", code_set=3), "name iqn.x??[2J"),
        (UUID, "uuid.1000" + "ab" * 16),
        (MD5, "md5.0123456789abcdef0123456789abcdef"),
        (VENDOR, "vendor anything"),
        (_designator(0, "00ff"), "vendor 00ff"),
        (PORT, "target port 1"),
        (_designator(5, "00000102", association=1), "target port group 258"),
        (_designator(6, "00000003"), "logical unit group 3"),
        (_designator(9, "0001"), "designator type 9h 0001"),
        (_designator(4, ""), "target port 0"),
    ],
)
def test_describe(designator: Designator, text: str) -> None:
    assert designator.describe() == text


RANKING = [NAA_6, NAA_3, NAA_5, NAA_2, EUI, T10, NAME, UUID, MD5]


@pytest.mark.parametrize("position", range(len(RANKING)))
def test_ranking(position: int) -> None:
    rest = [VENDOR, PORT, *RANKING[position:]]
    assert best_designator(rest) is RANKING[position]
    assert best_designator(reversed(rest)) is RANKING[position]


@pytest.mark.parametrize(
    "designators",
    [
        [],
        [VENDOR, PORT],
        [_designator(3, NAA_6.identifier, association=1), _designator(3, NAA_6.identifier, association=2)],
        # wrong lengths: half an identity is none
        [_designator(3, NAA_6.identifier[:15]), _designator(3, NAA_5.identifier + b"\1")],
        [_designator(3, "9000000000000001"), _designator(3, "")],
        [_designator(2, "0010a000"), _designator(7, "01"), _designator(10, "1000")],
        # blank ones
        [_designator(2, bytes(8)), _designator(1, b" " * 16, code_set=2), _designator(8, b"\0\0\0\0", code_set=3)],
        # not known
        [_designator(15, "01")],
    ],
)
def test_no_identity(designators: list[Designator]) -> None:
    assert best_designator(designators) is None


@given(st.permutations([NAA_6, _designator(3, "6" + "1" * 31), _designator(3, "6" + "2" * 31), EUI, T10]))
def test_the_order_of_the_page_does_not_matter(designators: list[Designator]) -> None:
    assert best_designator(designators) == NAA_6


@given(
    st.permutations(
        [
            replace(NAA_6, code_set=3),
            replace(NAA_6, protocol=0),
            replace(NAA_6, protocol=5),
            replace(NAA_6, code_set=2),
        ]
    )
)
def test_the_order_of_the_page_does_not_matter_for_one_name_either(designators: list[Designator]) -> None:
    assert best_designator(designators) == replace(NAA_6, protocol=0)
