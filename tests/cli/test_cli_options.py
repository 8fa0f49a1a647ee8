import argparse
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.cli.options import IGNORED, OPTIONS, Options, add_flags, parse_list, resolve
from iscsifuse.errors import UsageError

MIB = 1 << 20
NAME = "iqn.2004-04.com.example:host"

GOOD: list[tuple[str, str, Any]] = [
    ("cache_size=64M", "cache_size", 64 * MIB),
    ("cache_size=1024K", "cache_size", MIB),
    ("cache_size=2G", "cache_size", 2 << 30),
    ("cache_size=1048576", "cache_size", MIB),
    ("read_ahead=0", "read_ahead", 0),
    ("read_ahead=8M", "read_ahead", 8 * MIB),
    ("write=behind", "write_behind", True),
    ("write=through", "write_behind", False),
    ("timeout=30", "timeout", 30.0),
    ("timeout=0.5", "timeout", 0.5),
    ("login_timeout=3", "login_timeout", 3.0),
    ("reconnect_timeout=0", "reconnect_timeout", 0.0),
    ("reconnect_timeout=600", "reconnect_timeout", 600.0),
    ("header_digest=crc32c", "header_digest", True),
    ("header_digest=none", "header_digest", False),
    ("data_digest=crc32c", "data_digest", True),
    (f"initiator_name={NAME}", "initiator_name", NAME),
    ("chap_user=alice", "chap_user", "alice"),
    ("chap_secret_file=/etc/x=y", "chap_secret_file", "/etc/x=y"),
    ("target_user=t", "target_user", "t"),
    ("target_secret_file=/t", "target_secret_file", "/t"),
    ("uid=0", "uid", 0),
    ("uid=4294967294", "uid", 4294967294),
    ("gid=1000", "gid", 1000),
    ("mode=640", "mode", 0o640),
    ("mode=0400", "mode", 0o400),
    ("lun=0", "luns", (0,)),
    ("lun=3:1", "luns", (1, 3)),
    ("lun=1+3", "luns", (1, 3)),
    ("lun=1-3", "luns", (1, 2, 3)),
    ("lun=16383", "luns", (16383,)),
]
SWITCHES: list[tuple[str, str, Any]] = [
    ("rw", "read_write", True),
    ("ro", "read_write", False),
    ("allow_other", "allow_other", True),
    ("direct_io", "direct_io", True),
]


def flags(*arguments: str, mount: bool = True) -> Options:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_flags(parser, mount=mount)
    return resolve(parser.parse_args(arguments).settings)


@pytest.mark.parametrize(("text", "attribute", "value"), GOOD + SWITCHES)
def test_in_the_list(text: str, attribute: str, value: object) -> None:
    assert getattr(resolve(parse_list(text)), attribute) == value


@pytest.mark.parametrize(("text", "attribute", "value"), GOOD)
def test_as_a_flag(text: str, attribute: str, value: object) -> None:
    name, _, argument = text.partition("=")
    flag = "--" + name.replace("_", "-")
    assert getattr(flags(flag, argument), attribute) == value
    assert getattr(flags(f"{flag}={argument}"), attribute) == value


@pytest.mark.parametrize(("text", "attribute", "value"), SWITCHES)
def test_as_a_switch(text: str, attribute: str, value: object) -> None:
    assert getattr(flags("--" + text.replace("_", "-")), attribute) == value


def test_every_option_is_in_these_tables() -> None:
    tested = {text.partition("=")[0] for text, _, _ in GOOD + SWITCHES}
    assert tested | {"sync"} == {option.name for option in OPTIONS}


def test_nothing_said() -> None:
    assert resolve([]) == Options() == flags()


def test_list_of_many() -> None:
    options = resolve(parse_list("rw,dev,suid,cache_size=1M,,_netdev,x-systemd.automount,uid=5"))
    assert options == Options(read_write=True, cache_size=MIB, uid=5)


@pytest.mark.parametrize(
    "text",
    [
        *sorted(IGNORED),
        "x-systemd.requires=a.service",
        "x-initrd.mount",
        "X-mount.mkdir=0755",
        "comment=hello",
        "user=joe",
        "uhelper=udisks2",
    ],
)
def test_ignored(text: str) -> None:
    assert resolve(parse_list(text)) == Options()
    assert resolve(parse_list(f"ro,{text},uid=1")) == Options(uid=1)


@pytest.mark.parametrize(
    ("words", "read_write"),
    [
        (["-o", "ro"], False),
        (["-o", "rw"], True),
        (["-o", "rw,ro"], False),
        (["-o", "ro,rw"], True),
        (["--rw", "-o", "ro"], False),
        (["-o", "ro", "--rw"], True),
        (["-o", "ro", "-o", "rw"], True),
        (["--rw", "--ro"], False),
        (["-orw"], True),
    ],
)
def test_last_of_ro_and_rw_wins(words: list[str], read_write: bool) -> None:
    assert flags(*words).read_write is read_write


@pytest.mark.parametrize(
    ("text", "luns"),
    [
        ("lun=1,3", (1, 3)),
        ("lun=1,3,rw", (1, 3)),
        ("ro,lun=3,1-2,dev", (1, 2, 3)),
        ("lun=1,lun=4", (1, 4)),
        ("lun=1,1", (1,)),
    ],
)
def test_lun_list_with_commas(text: str, luns: tuple[int, ...]) -> None:
    assert resolve(parse_list(text)).luns == luns


def test_lun_flag_with_commas() -> None:
    assert flags("--lun", "0,3-4", "--lun", "9").luns == (0, 3, 4, 9)


def test_escaped_commas() -> None:
    options = resolve(parse_list(r"chap_user=a\,b\\c,chap_secret_file=/x\y"))
    assert options.chap_user == r"a,b\c"
    assert options.chap_secret_file == r"/x\y"


@given(st.text(min_size=1))
def test_any_text_can_be_escaped(text: str) -> None:
    escaped = text.replace("\\", "\\\\").replace(",", "\\,")
    assert resolve(parse_list(f"rw,chap_user={escaped},uid=1")) == Options(read_write=True, chap_user=text, uid=1)


@pytest.mark.parametrize(
    ("text", "write_behind"),
    [
        ("direct_io", False),
        ("direct_io,write=behind", False),
        ("write=behind,direct_io", False),
        ("sync", False),
        ("sync,write=behind", True),
        ("write=behind,sync", False),
    ],
)
def test_write_through(text: str, write_behind: bool) -> None:
    assert resolve(parse_list(text)).write_behind is write_behind


BAD = [
    ("cache_size=64m", "a size such as 64M"),
    ("cache_size=64MB", "a size such as 64M"),
    ("cache_size=1_0M", "a size such as 64M"),
    ("cache_size= 64M", "a size such as 64M"),
    ("cache_size=-1", "a size such as 64M"),
    ("cache_size=1.5G", "a size such as 64M"),
    ("cache_size=٦٤M", "a size such as 64M"),
    ("cache_size=M", "a size such as 64M"),
    ("cache_size=0", "1M or more"),
    ("cache_size=1023K", "1M or more"),
    ("cache_size=9999999999999G", "a size such as 64M"),
    ("read_ahead=", "0 for none"),
    ("write=back", "behind or through"),
    ("timeout=0", "above 0"),
    ("timeout=1e3", "a number of seconds"),
    ("timeout=nan", "a number of seconds"),
    ("timeout=inf", "a number of seconds"),
    ("timeout=-5", "a number of seconds"),
    ("timeout=5s", "a number of seconds"),
    ("timeout=604801", "at most a week"),
    ("reconnect_timeout=-1", "0 for none"),
    ("header_digest=CRC32C", "none or crc32c"),
    ("data_digest=yes", "none or crc32c"),
    ("initiator_name=me", "an iSCSI name such as"),
    ("chap_user=", "isn't empty"),
    ("uid=root", "id(1)"),
    ("uid=-1", "id(1)"),
    ("uid=4294967295", "id(1)"),
    ("gid=1_0", "id(1)"),
    ("mode=8", "octal"),
    ("mode=0o640", "octal"),
    ("mode=7777", "octal"),
    ("mode=40", "octal"),
    ("lun=", "a list of LUNs"),
    ("lun=x", "a list of LUNs"),
    ("lun=3-1", "a list of LUNs"),
    ("lun=16384", "a list of LUNs"),
    ("lun=1::2", "a list of LUNs"),
    ("lun=-1", "a list of LUNs"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad_value_in_the_list(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_list(f"ro,{text}")
    assert words in str(raised.value)
    assert text.partition("=")[0] in str(raised.value)


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad_value_of_a_flag(text: str, words: str) -> None:
    name, _, value = text.partition("=")
    with pytest.raises(UsageError) as raised:
        flags(f"--{name.replace('_', '-')}={value}")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cache_siz=1M", "there is no option 'cache_siz': did you mean cache_size?"),
        ("cache-size=1M", "did you mean cache_size?"),
        ("readahead=1M", "did you mean read_ahead?"),
        ("allow-other", "did you mean allow_other?"),
        ("qqq", "there are allow_other"),
        ("password=secret", "there is no option 'password'"),
        ("RO", "there is no option 'RO'"),
        ("remount", "remount is not supported"),
        ("rw=1", "rw takes no value"),
        ("allow_other=yes", "allow_other takes no value"),
        ("uid", "uid needs a value: uid=N"),
        ("lun", "lun needs a value"),
        ("5", "there is no option '5'"),
    ],
)
def test_bad_option(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_list(text)
    assert words in str(raised.value)
    assert "secret'" not in str(raised.value)


def test_session_flags_only() -> None:
    assert flags("--timeout", "5", "--chap-user", "a", mount=False) == Options(timeout=5.0, chap_user="a")
    for flag in ("--rw", "-o", "--cache-size"):
        with pytest.raises((SystemExit, argparse.ArgumentError)):
            flags(flag, "1M", mount=False)


def test_no_flag_for_what_only_mount_says() -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        flags("--sync")


def test_flags_of_one_parser_do_not_pile_up() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, mount=True)
    assert resolve(parser.parse_args(["--rw"]).settings).read_write
    assert not resolve(parser.parse_args([]).settings).read_write
