"""Answers to SendTargets."""

import contextlib

from fuzz.words import check_message
from iscsifuse.errors import FormatError, ProtocolError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.names import validate_iscsi_name
from iscsifuse.iscsi.pdu import RESERVED_TAG, decode_stream
from iscsifuse.iscsi.response import TextResponse
from iscsifuse.iscsi.sendtargets import TargetAddress, TextExchange, parse, parse_address

__all__ = ["PDUS", "check"]

PDUS = 0x80
"""Option: PDUs follow, and not one text."""
_LIMIT = 4096
_DEFAULT = TargetAddress("192.0.2.1", 3260, 1)


def check(data: bytes) -> None:
    """The first byte chooses the form (`PDUS`) and the size of PDUs that the text is cut into."""
    if not data:
        return
    exchange = TextExchange([("SendTargets", "All")], itt=1, limit=_LIMIT)
    assert exchange.start().encode()
    try:
        if data[0] & PDUS:
            _play_stream(exchange, data[1:])
        else:
            _play_text(exchange, data[1:], size=data[0] * 8 + 1)
    except ProtocolError as error:
        check_message(error)
        return
    assert exchange.done or exchange.pairs == []
    records, warnings = parse(exchange.pairs, default=_DEFAULT)
    for warning in warnings:
        check_message(warning)
    assert len(warnings) <= 101
    assert len({record.name for record in records}) == len(records)
    for record in records:
        assert validate_iscsi_name(record.name) == record.name
        assert record.addresses
        assert len(set(record.addresses)) == len(record.addresses)
        for address in record.addresses:
            assert parse_address(str(address)) == address
            assert str(address).isprintable()
            assert 1 <= address.port <= 65535


def _play_text(exchange: TextExchange, data: bytes, *, size: int) -> None:
    pieces = text.split(data, size)
    for number, piece in enumerate(pieces, 1):
        last = number == len(pieces)
        pdu = TextResponse(itt=1, final=last, cont=not last, ttt=RESERVED_TAG if last else number, data=piece)
        request = exchange.receive(pdu)
        assert (request is None) is last
        assert exchange.done is last
    with contextlib.suppress(FormatError):
        assert exchange.pairs == text.decode(data)


def _play_stream(exchange: TextExchange, stream: bytes) -> None:
    while not exchange.done and (found := decode_stream(stream, max_data=65536)) is not None:
        pdu, used = found
        stream = stream[used:]
        request = exchange.receive(pdu)
        if request is not None:
            assert isinstance(pdu, TextResponse)
            assert (request.ttt, request.lun, request.itt) == (pdu.ttt, pdu.lun, 1)
            assert request.encode()
