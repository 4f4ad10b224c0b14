"""Which worker addresses are called: the rules as functions. No connection is opened, and names are resolved by a table."""

from __future__ import annotations

import ipaddress

import pytest

from llava.serve.http.addresses import (
    AddressRules,
    Caller,
    WorkerUrl,
    checked_endpoint,
    may_call,
    parse_network,
    parse_worker_url,
    peer_may_register,
)

LOCAL = Caller("127.0.0.1")
REMOTE = Caller("10.1.2.3")
HOLDER = Caller("203.0.113.9", has_token=True)
NOTHING_SET = AddressRules()
TOKEN = AddressRules(token_required=True)


def listed(*texts: str, token_required: bool = False) -> AddressRules:
    return AddressRules(tuple(parse_network(text) for text in texts), token_required)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://localhost:40000", WorkerUrl("http", "localhost", 40000)),
        ("https://Worker-1.Example.com:443/", WorkerUrl("https", "worker-1.example.com", 443)),
        ("http://10.0.0.7:1", WorkerUrl("http", "10.0.0.7", 1)),
        ("http://[::1]:65535", WorkerUrl("http", "::1", 65535)),
        ("http://[0:0:0:0:0:0:0:1]:8000", WorkerUrl("http", "::1", 8000)),
        ("http://worker_1:8000", WorkerUrl("http", "worker_1", 8000)),
    ],
)
def test_an_address_has_one_spelling(text: str, url: WorkerUrl) -> None:
    assert parse_worker_url(text) == url
    assert parse_worker_url(url.text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:40000",
        "http://localhost",
        "http://localhost:",
        "http://localhost:0",
        "http://localhost:080",
        "http://localhost:65536",
        "http://localhost:123456",
        "http://localhost:4000\u0660",
        "ftp://localhost:21",
        "file:///etc/passwd",
        "gopher://localhost:70",
        "HTTP://localhost:80",
        "http://user@localhost:80",
        "http://user:secret@localhost:80",
        "http://127.0.0.1:80@169.254.169.254:80",
        "http://localhost:80/path",
        "http://localhost:80/../x",
        "http://localhost:80//",
        "http://localhost:80?x=1",
        "http://localhost:80#x",
        "http://localhost:80\\@10.0.0.1",
        "http://local host:80",
        "http://localhost:80\r\nHost: x",
        "http://localhost:80\n",
        " http://localhost:80",
        "http://localhost%2e:80",
        "http://127.0.0.1%00:80",
        "http://[fe80::1%25eth0]:80",
        "http://[::1:80",
        "http://[not-an-address]:80",
        "http://[127.0.0.1]:80",
        "http://::1:80",
        "http://-worker:80",
        "http://worker..local:80",
        "http://worker.:80",
        "http://.:80",
        "http://\u24dbocalhost:80",
        "http://\uff11\uff12\uff17.0.0.1:80",
        # one number, octal, hexadecimal, too few parts: what the C library would still read as 127.0.0.1 or 169.254.169.254
        "http://2130706433:80",
        "http://2852039166:80",
        "http://0177.0.0.1:80",
        "http://0251.0376.0251.0376:80",
        "http://0x7f.0.0.1:80",
        "http://0x7f000001:80",
        "http://0xa9fea9fe:80",
        "http://127.1:80",
        "http://127.0.1:80",
        "http://127.0.0.01:80",
        "http://127.0.0.0x1:80",
        "http://127.0.0.1.:80",
        "http://256.0.0.1:80",
        "http://1.2.3.4.5:80",
        "http://" + "a" * 64 + ":80",
        "http://" + "a." * 200 + "b:80",
    ],
)
def test_anything_else_is_no_worker_address(text: str) -> None:
    with pytest.raises(ValueError, match="worker's"):
        parse_worker_url(text)


@pytest.mark.parametrize(
    ("rules", "caller", "may"),
    [
        (NOTHING_SET, LOCAL, True),
        (NOTHING_SET, Caller("::1"), True),
        (NOTHING_SET, Caller("::ffff:127.0.0.1"), True),
        (NOTHING_SET, REMOTE, False),
        (NOTHING_SET, Caller(None), False),
        (NOTHING_SET, Caller("testclient"), False),
        (NOTHING_SET, Caller("203.0.113.9", has_token=True), False),  # nobody set a token
        (listed("10.1.0.0/16"), REMOTE, True),
        (listed("10.1.0.0/16"), Caller("::ffff:10.1.2.3"), True),
        (listed("10.1.0.0/16"), Caller("10.2.0.1"), False),
        (listed("10.1.0.0/16"), LOCAL, True),
        (TOKEN, LOCAL, False),
        (TOKEN, HOLDER, True),
        (listed("10.1.0.0/16", token_required=True), REMOTE, False),
    ],
)
def test_who_may_register(rules: AddressRules, caller: Caller, may: bool) -> None:
    assert peer_may_register(rules, caller) is may


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_belongs_to_callers_on_the_same_machine(address: str) -> None:
    assert may_call(NOTHING_SET, LOCAL, address)
    assert may_call(listed("10.0.0.0/8"), LOCAL, address)
    assert may_call(TOKEN, Caller("127.0.0.1", has_token=True), address)
    assert not may_call(listed("10.0.0.0/8"), REMOTE, address)
    assert not may_call(TOKEN, HOLDER, address)
    assert may_call(listed(address, token_required=True), HOLDER, address)


@pytest.mark.parametrize("address", ["10.0.0.7", "172.16.0.1", "192.168.1.1", "8.8.8.8", "fd12::1", "2606:4700::1"])
def test_other_machines_need_the_token_or_the_list(address: str) -> None:
    assert not may_call(NOTHING_SET, LOCAL, address)
    assert may_call(TOKEN, HOLDER, address)
    assert may_call(listed(address), LOCAL, address)
    assert not may_call(listed("10.9.0.0/16", token_required=True), HOLDER, address)
    assert may_call(listed(address, token_required=True), HOLDER, address)


@pytest.mark.parametrize("address", ["169.254.169.254", "169.254.1.1", "fe80::1", "100.100.100.200", "168.63.129.16", "fd00:ec2::254"])
def test_link_local_and_metadata_are_listed_one_by_one(address: str) -> None:
    assert not may_call(NOTHING_SET, LOCAL, address)
    assert not may_call(TOKEN, HOLDER, address)
    assert not may_call(listed("0.0.0.0/0", "::/0"), LOCAL, address)
    assert not may_call(listed("169.254.0.0/16", "fe80::/10"), LOCAL, address)
    assert may_call(listed(address), LOCAL, address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "::",
        "224.0.0.1",
        "ff02::1",
        "240.0.0.1",
        "255.255.255.255",
        "::ffff:10.0.0.7",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::a00:7",
        "2002:a00:7::1",
        "2002:7f00:1::",
        "fe80::1%eth0",
        "::1%lo",
        # other spellings than the one that was checked
        "2130706433",
        "0177.0.0.1",
        "0x7f.0.0.1",
        "127.1",
        "0:0:0:0:0:0:0:1",
        "[::1]",
        "127.0.0.1.",
        "localhost",
        "",
    ],
)
def test_some_addresses_are_never_called(address: str) -> None:
    everything = listed("0.0.0.0/0", "::/0", token_required=True)
    for rules in (NOTHING_SET, TOKEN, everything, listed("0.0.0.0/0", "::/0")):
        assert not may_call(rules, Caller("127.0.0.1", has_token=True), address)


def test_a_name_is_resolved_once_and_every_address_of_it_is_checked() -> None:
    asked: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return {
            "localhost": ["::1", "127.0.0.1"],
            "rebound": ["127.0.0.1", "169.254.169.254"],
            "many": ["127.0.0.1"] + [f"127.0.0.{i}" for i in range(2, 20)],
        }.get(host, [])

    endpoint = checked_endpoint(NOTHING_SET, LOCAL, parse_worker_url("http://localhost:40000"), resolve)
    assert endpoint.addresses == ("::1", "127.0.0.1") and asked == [("localhost", 40000)]
    assert [endpoint.base(address) for address in endpoint.addresses] == ["http://[::1]:40000", "http://127.0.0.1:40000"]
    with pytest.raises(PermissionError):
        checked_endpoint(NOTHING_SET, LOCAL, parse_worker_url("http://rebound:1"), resolve)
    for host in ("nowhere", "many"):
        with pytest.raises(ValueError, match="addresses"):
            checked_endpoint(NOTHING_SET, LOCAL, parse_worker_url(f"http://{host}:1"), resolve)


def test_names_are_not_resolved_for_strangers_nor_addresses_at_all() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("nothing was to be resolved")

    with pytest.raises(PermissionError):
        checked_endpoint(NOTHING_SET, REMOTE, parse_worker_url("http://secrets.example.com:1"), resolve)
    assert checked_endpoint(NOTHING_SET, LOCAL, parse_worker_url("http://127.0.0.1:1"), resolve).addresses == ("127.0.0.1",)
    with pytest.raises(PermissionError):
        checked_endpoint(NOTHING_SET, LOCAL, parse_worker_url("http://169.254.169.254:80"), resolve)


@pytest.mark.parametrize(
    "text", ["", "worker", "10.0.0.0/33", "10.0.0.1/8", "http://10.0.0.1", "0.0.0.0", "255.255.255.255", "::", "ff02::1"]
)
def test_a_list_entry_is_an_address_or_a_network(text: str) -> None:
    with pytest.raises(ValueError, match="--allow-worker"):
        parse_network(text)


def test_list_entries() -> None:
    assert parse_network("10.1.0.0/16") == ipaddress.ip_network("10.1.0.0/16")
    assert parse_network("::1") == ipaddress.ip_network("::1/128")
