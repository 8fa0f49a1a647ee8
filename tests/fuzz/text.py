"""Text keys: the pairs, the values in them, and what a negotiation makes of them."""

import contextlib

from fuzz.words import check_message
from iscsifuse.errors import FormatError, NegotiationError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.names import MAX_NAME_LENGTH, printable, validate_iscsi_name
from iscsifuse.iscsi.negotiation import Negotiation
from iscsifuse.iscsi.parameters import LoginConfig, NegotiatedParameters
from iscsifuse.iscsi.request import Stage

__all__ = ["check_negotiation", "check_parameters", "check_text"]

_LIMIT = 2048
INITIATOR = "iqn.2026-11.com.example:initiator"
TARGET = "iqn.2026-11.com.example:fuzz"


def check_text(data: bytes) -> None:
    """All of it is a text; its first byte also chooses where it is cut into PDUs."""
    size = data[0] + 1 if data else 1
    try:
        pairs = text.decode(data)
    except FormatError:
        pairs = None
    assembler = text.Assembler(_LIMIT)
    assembled = None
    pieces = text.split(data, size)
    assert b"".join(pieces) == data
    try:
        for number, piece in enumerate(pieces, 1):
            assembled = assembler.add(piece, cont=number < len(pieces))
    except FormatError:
        assert pairs is None or len(data) > _LIMIT
    else:
        assert assembled == pairs
        assert not assembler.partial
    for key, value in pairs or ():
        _check_value(value)
        with contextlib.suppress(FormatError):  # an escaped value may be longer than what it came from
            assert text.decode(text.encode([(key, value)])) == [(key, value)]


def _check_value(value: str) -> None:
    with contextlib.suppress(FormatError):
        number = text.number(value, high=(1 << 64) - 1)
        assert number == int(value, 16 if value[:2] in ("0x", "0X") else 10)
    with contextlib.suppress(FormatError):
        assert text.boolean(value) is (value == "Yes")
    with contextlib.suppress(FormatError):
        binary = text.binary(value, 1024)
        assert 1 <= len(binary) <= 1024
        assert text.binary(text.hex_encode(binary), 1024) == binary
    shown = printable(value, limit=100)
    assert shown.isprintable()
    assert len(shown) <= 10 * 100 + 3
    with contextlib.suppress(FormatError):
        assert validate_iscsi_name(value) == value
        assert len(value.encode()) <= MAX_NAME_LENGTH
        assert value.isprintable()
        assert not set(value) & set("/\0 ")


def check_negotiation(data: bytes) -> None:
    """The first byte chooses what we offer; texts of the target follow, parted by two NULs.

    The first text belongs to the security stage, the others to the operational one.
    """
    if not data:
        return
    options = data[0]
    discovery = bool(options & 1)
    config = LoginConfig(
        initiator_name=INITIATOR,
        target_name=None if discovery else TARGET,
        header_digest=bool(options & 2),
        data_digest=bool(options & 4),
        initial_r2t=bool(options & 8),
        immediate_data=not options & 16,
        max_burst_length=4096 if options & 32 else 16776192,
    )
    negotiation = Negotiation(config)
    stage = Stage.SECURITY_NEGOTIATION
    try:
        for piece in data[1:].split(b"\0\0"):
            answers = negotiation.receive(text.decode(piece), stage=stage)
            assert 512 <= negotiation.send_limit <= 8192
            with contextlib.suppress(FormatError):  # an escaped key of theirs may be too long to be said again
                text.encode(answers)
            stage = Stage.LOGIN_OPERATIONAL_NEGOTIATION
        result = negotiation.result()
    except (FormatError, NegotiationError) as error:
        check_message(error)
        return
    check_parameters(result, config)


def check_parameters(result: NegotiatedParameters, config: LoginConfig) -> None:
    """Whatever was agreed on lies within what the standard allows and what was offered."""
    assert (result.header_digest, result.data_digest) == (config.header_digest, config.data_digest)
    assert result.max_recv_data_segment_length == config.max_recv_data_segment_length
    assert 512 <= result.target_max_recv_data_segment_length <= 0xFFFFFF
    assert 512 <= result.first_burst_length <= result.max_burst_length <= 0xFFFFFF
    if not config.discovery:
        assert result.max_burst_length <= max(config.max_burst_length, 262144)  # the default, where it is refused
    assert result.error_recovery_level == 0
    assert result.max_connections == 1
    assert 1 <= result.max_outstanding_r2t <= max(config.max_outstanding_r2t, 1)
    assert 0 <= result.default_time2wait <= 3600
    assert 0 <= result.default_time2retain <= 3600
    assert result.data_pdu_in_order
    assert result.data_sequence_in_order
    assert all(value.isprintable() for value in result.as_keys().values())
