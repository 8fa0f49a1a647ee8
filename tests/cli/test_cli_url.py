import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.cli.url import AUTH_METHODS, QUERY_KEYS, parse
from iscsifuse.errors import IscsifuseError, UrlError
from iscsifuse.initiator.settings import Portal

IQN = "iqn.2004-04.com.example:disk"


@pytest.mark.parametrize(
    ("text", "portal"),
    [
        ("iscsi://san.example", Portal("san.example", 3260)),
        ("iscsi://san.example/", Portal("san.example", 3260)),
        ("iscsi://san.example:3261/", Portal("san.example", 3261)),
        ("iscsi://10.0.0.1:1", Portal("10.0.0.1", 1)),
        ("iscsi://10.0.0.1:65535", Portal("10.0.0.1", 65535)),
        ("iscsi://10.0.0.1:03260", Portal("10.0.0.1", 3260)),
        ("ISCSI://san.example", Portal("san.example", 3260)),
        ("iscsi://[fe80::1]", Portal("fe80::1", 3260)),
        ("iscsi://[::1]:860/", Portal("::1", 860)),
        ("iscsi://[fe80::1%25eth0]:3260/", Portal("fe80::1%eth0", 3260)),
        ("iscsi://[fe80::1%eth0]/", Portal("fe80::1%eth0", 3260)),
        ("iscsi://s%61n.example/", Portal("san.example", 3260)),
        ("iscsi://bücher.example/", Portal("bücher.example", 3260)),
        ("iscsi://user@san.example/", Portal("san.example", 3260)),
        ("iscsi://san?", Portal("san", 3260)),
        ("iscsi://san?auth=md5", Portal("san", 3260)),
    ],
)
def test_portal(text: str, portal: Portal) -> None:
    url = parse(text)
    assert url.portal == portal
    assert url.target_name is None
    assert url.lun is None


@pytest.mark.parametrize(
    ("text", "target", "lun"),
    [
        (f"iscsi://h/{IQN}", IQN, None),
        (f"iscsi://h/{IQN}/0", IQN, 0),
        (f"iscsi://h/{IQN}/16383", IQN, 16383),
        (f"iscsi://h/{IQN}/%31", IQN, 1),
        ("iscsi://h/iqn.2004-04.com.example%3Adisk/1", IQN, 1),
        ("iscsi://h/eui.02004567a425678d/1", "eui.02004567a425678d", 1),
        (f"iscsi://h/{IQN}/1?auth=md5", IQN, 1),
    ],
)
def test_target_and_lun(text: str, target: str, lun: int | None) -> None:
    url = parse(text)
    assert (url.target_name, url.lun) == (target, lun)


@pytest.mark.parametrize(
    ("userinfo", "user", "password"),
    [
        ("user", "user", None),
        ("user%secret", "user", "secret"),
        ("user%pa%40ss", "user", "pa@ss"),
        ("user%pa%2Fss%25", "user", "pa/ss%"),
        ("user%p@ss", "user", "p@ss"),
        ("user%p:ss", "user", "p:ss"),
        ("user%abcdef", "user", "abcdef"),
        ("us%40er%pass", "us@er", "pass"),
        ("iqn.1994-05.com.example:host", "iqn.1994-05.com.example:host", None),
        ("iqn.1994-05.com.example:host%secret", "iqn.1994-05.com.example:host", "secret"),
        ("dom:user%secret", "dom:user", "secret"),
        ("us er%sec ret", "us er", "sec ret"),
        ("user%gr%C3%BC%C3%9Fe", "user", "grüße"),
    ],
)
def test_user_and_password(userinfo: str, user: str, password: str | None) -> None:
    url = parse(f"iscsi://{userinfo}@host:3261/{IQN}/2")
    assert (url.user, url.password) == (user, password)
    assert (url.portal, url.target_name, url.lun) == (Portal("host", 3261), IQN, 2)


def test_query() -> None:
    url = parse(
        "iscsi://u%p@h/?header_digest=crc32c&data_digest=none&auth=sha-256&target_user=t%26t&target_password=a%3Db"
    )
    assert url.header_digest is True
    assert url.data_digest is False
    assert url.auth == "sha-256"
    assert url.target_user == "t&t"
    assert url.target_password == "a=b"


def test_what_is_not_said_is_none() -> None:
    url = parse("iscsi://h/")
    said = (
        url.header_digest,
        url.data_digest,
        url.auth,
        url.target_user,
        url.target_password,
        url.user,
        url.password,
    )
    assert said == (None,) * 7


@pytest.mark.parametrize("method", AUTH_METHODS)
def test_every_auth_method(method: str) -> None:
    assert parse(f"iscsi://h/?auth={method}").auth == method


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no URL"),
        ("san.example", "is no URL"),
        ("san.example:3260", "is no URL"),
        ("http://san.example/", "begin with iscsi://"),
        ("iser://san.example/", "begin with iscsi://"),
        ("iscsi://", "names no host"),
        ("iscsi:///", "names no host"),
        ("iscsi://:3260/", "names no host"),
        ("iscsi://user@/", "names no host"),
        ("iscsi://h:0", "is no port"),
        ("iscsi://h:65536", "is no port"),
        ("iscsi://h:", "is no port"),
        ("iscsi://h:+1", "is no port"),
        ("iscsi://h:1_0", "is no port"),
        ("iscsi://h: 80", "is no port"),
        ("iscsi://h:٣٢٦٠", "is no port"),
        ("iscsi://h:iqn/", "is no port"),
        ("iscsi://fe80::1/", "in brackets"),
        ("iscsi://[fe80::1", "in brackets"),
        ("iscsi://[fe80::1]3260/", "is no :port"),
        ("iscsi://[san]/", "is no IPv6 address"),
        ("iscsi://[10.0.0.1]/", "is no IPv6 address"),
        ("iscsi://[]/", "is no IPv6 address"),
        ("iscsi://h h/", "is no host"),
        ("iscsi://h%0a/", "is no host"),
        ("iscsi://h%2fx/", "is no host"),
        ("iscsi://h%zz/", "is no host"),
        ("iscsi://h\x1b[31m/", "is no host"),
        (f"iscsi://{'h' * 254}/", "is no host"),
        ("iscsi://h//", "names no target"),
        (f"iscsi://h//{IQN}", "names no target"),
        ("iscsi://h/%FF", "names no target"),
        ("iscsi://h/disk", "is no iSCSI name"),
        ("iscsi://h/iqn.2004-04.com.example:a%2Fb", "is no iSCSI name"),
        ("iscsi://h/iqn.2004-04.com.example:a..b", "is no iSCSI name"),
        (f"iscsi://h/{IQN}{'x' * 223}", "is no iSCSI name"),
        (f"iscsi://h/{IQN}#1", "is no iSCSI name"),
        (f"iscsi://h/{IQN}/", "is no LUN"),
        (f"iscsi://h/{IQN}/-1", "is no LUN"),
        (f"iscsi://h/{IQN}/+1", "is no LUN"),
        (f"iscsi://h/{IQN}/1_0", "is no LUN"),
        (f"iscsi://h/{IQN}/0x1", "is no LUN"),
        (f"iscsi://h/{IQN}/ 1", "is no LUN"),
        (f"iscsi://h/{IQN}/１", "is no LUN"),
        (f"iscsi://h/{IQN}/16384", "is no LUN"),
        (f"iscsi://h/{IQN}/999999999999", "is no LUN"),
        (f"iscsi://h/{IQN}/1/", "is no LUN"),
        (f"iscsi://h/{IQN}/1/2", "is no LUN"),
        ("iscsi://h/?digest=none", "'digest' is no key"),
        ("iscsi://h/?Auth=md5", "'Auth' is no key"),
        ("iscsi://h/?auth=md5&", "'' is no key"),
        ("iscsi://h/?auth", "auth has no value"),
        ("iscsi://h/?auth=", "is no auth"),
        ("iscsi://h/?auth=MD5", "is no auth"),
        ("iscsi://h/?header_digest=crc32", "is no header_digest"),
        ("iscsi://h/?data_digest=yes", "is no data_digest"),
        ("iscsi://h/?target_user=", "target_user is empty"),
        ("iscsi://h/?target_user=%", "no value that can be decoded"),
        ("iscsi://h/?auth=md5&auth=sha1", "auth twice"),
        ("iscsi://@h/", "no user"),
        ("iscsi://%secret@h/", "no user"),
        ("iscsi://user%@h/", "password is empty"),
        ("iscsi://user%se%cret@h/", "can't be decoded"),
        ("iscsi://user%a%00@h/", "can't be decoded"),
    ],
)
def test_bad_url(text: str, words: str) -> None:
    with pytest.raises(UrlError) as raised:
        parse(text)
    message = str(raised.value)
    assert words in message
    assert "\n" not in message
    assert "\x1b" not in message


def test_bad_key_names_those_that_there_are() -> None:
    with pytest.raises(UrlError) as raised:
        parse("iscsi://h/?force_usn=1")
    assert all(key in str(raised.value) for key in QUERY_KEYS)


@pytest.mark.parametrize(
    ("text", "portal"),
    [
        ("san.example", Portal("san.example")),
        ("san.example:3261", Portal("san.example", 3261)),
        ("10.0.0.1", Portal("10.0.0.1")),
        ("[fe80::1]:3260", Portal("fe80::1")),
        ("iscsi://10.0.0.1:3261/", Portal("10.0.0.1", 3261)),
        ("10.0.0.1/", Portal("10.0.0.1")),
    ],
)
def test_portal_only(text: str, portal: Portal) -> None:
    assert parse(text, portal_only=True).portal == portal


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"iscsi://h/{IQN}", "only a portal"),
        (f"h/{IQN}/1", "only a portal"),
        ("http://h/", "begin with iscsi://"),
        ("", "names no host"),
        ("fe80::1", "in brackets"),
    ],
)
def test_portal_only_refuses(text: str, words: str) -> None:
    with pytest.raises(UrlError, match=words):
        parse(text, portal_only=True)


@pytest.mark.parametrize(
    ("text", "display"),
    [
        ("iscsi://h", "iscsi://h/"),
        (f"iscsi://h:3261/{IQN}/1", f"iscsi://h:3261/{IQN}/1"),
        (f"iscsi://user%s3cret@[::1]:3261/{IQN}/1", f"iscsi://user@[::1]:3261/{IQN}/1"),
        (
            f"iscsi://user%s3cret@h/{IQN}?auth=md5&target_user=t&target_password=s3cret",
            f"iscsi://user@h/{IQN}?auth=md5&target_user=t",
        ),
        ("iscsi://user%s3cret@h/?target%5Fpassword=s3cret", "iscsi://user@h/"),
        ("iscsi://us%40er%s3cret@h/", "iscsi://us%40er@h/"),
    ],
)
def test_display_has_no_password(text: str, display: str) -> None:
    url = parse(text)
    assert url.display == str(url) == display
    assert "s3cret" not in repr(url)
    assert parse(url.display).target_name == url.target_name


@pytest.mark.conformance("B11")
@pytest.mark.parametrize(
    "text",
    [
        "iscsi://user%s3/cret@h/iqn.2004-04.com.example:x",
        "iscsi://user%s3?cret@h/",
        "iscsi://user%s3cret%@h/",
        "iscsi://user%s3cret@h:port/",
        "iscsi://user%s3cret@h h/",
        "iscsi://user%s3cret@/",
        "iscsi://user%s3cret@h/disk",
        "iscsi://user%s3cret@h/iqn.2004-04.com.example:x/y",
        "iscsi://user%s3cret@h/?what=s3cret",
        "iscsi://user%s3cret@[h]/",
        "iscsi://user%41s3/s3cret@h/x",
        "iscsi://user:s3cret@h/",
        "http://user%s3cret@h/",
        "user%s3cret@h",
        "iscsi://h/?target_password=s3cret%",
        "iscsi://h/?target_pasword=s3cret",
        "iscsi://user%41/s3cret@h/iqn.2004-04.com.example:x",
    ],
)
def test_no_message_has_a_password(text: str) -> None:
    with pytest.raises(UrlError) as raised:
        parse(text)
    shown = f"{raised.value!r} {raised.value.__cause__!r}"
    assert "s3" not in shown
    assert "cret" not in shown


@given(st.text(max_size=60))
def test_anything_else_is_a_url_error(text: str) -> None:
    for candidate in (text, f"iscsi://{text}", f"iscsi://h/{text}", f"iscsi://h/{IQN}/{text}", f"iscsi://h?{text}"):
        try:
            parse(candidate)
        except IscsifuseError as error:
            assert isinstance(error, UrlError)  # noqa: PT017 - no other class may come out


@given(user=st.text(min_size=1), password=st.text(min_size=1))
def test_fully_encoded_passwords_come_back(user: str, password: str) -> None:
    from urllib.parse import quote

    if "\0" in password or not (user.isascii() and user.isalnum()):
        user, password = "user", password.replace("\0", "0")
    try:
        encoded = quote(password, safe="")
    except UnicodeEncodeError:
        return
    url = parse(f"iscsi://{user}%{encoded}@h/")
    assert (url.user, url.password) == (user, password)
