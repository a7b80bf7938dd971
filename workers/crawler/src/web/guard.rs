//! Which addresses a server's word may lead to: only those of the public internet.
//!
//! Anybody can write `http://169.254.169.254/` into a list or a redirect, or let a name of their own resolve to it. So every address is
//! looked at where the connection is made: literal ones in an address, and what DNS says of a name, each time it says it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use url::{Host, Url};

/// The address that an address names literally, `localhost` (RFC 6761, section 6.3) included.
pub(super) fn literal(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Ipv4(ip) => Some(ip.into()),
        Host::Ipv6(ip) => Some(ip.into()),
        Host::Domain(name) => {
            let name = name.strip_suffix('.').unwrap_or(name);
            (name == "localhost" || name.ends_with(".localhost")).then_some(Ipv4Addr::LOCALHOST.into())
        }
    }
}

/// Whether `ip` may be asked: it is public, or one of the networks in `allowed` holds it.
pub(super) fn admits(allowed: &[IpNet], ip: IpAddr) -> bool {
    let inner = embedded(ip).map(IpAddr::V4);
    allowed.iter().any(|net| net.contains(&ip) || inner.is_some_and(|v4| net.contains(&v4))) || is_public(ip)
}

/// Whether an address is globally reachable, by the IANA registries of special-purpose addresses (RFC 6890 and its updates).
fn is_public(ip: IpAddr) -> bool {
    match (ip, embedded(ip)) {
        (IpAddr::V4(v4), _) | (IpAddr::V6(_), Some(v4)) => is_public_v4(v4),
        (IpAddr::V6(v6), None) => is_public_v6(v6),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    !match ip.octets() {
        [0 | 10 | 127, ..] => true,             // this network, private, loopback
        [100, b, ..] => (64..128).contains(&b), // carriers' NAT
        [169, 254, ..] => true,                 // link-local, and the metadata services of clouds
        [172, b, ..] => (16..32).contains(&b),
        [192, 0, 0 | 2, _] => true, // protocol assignments, documentation
        [192, 88, 99, _] => true,   // 6to4 relays
        [192, 168, ..] => true,
        [198, 18 | 19, ..] => true,                   // benchmarks
        [198, 51, 100, _] | [203, 0, 113, _] => true, // documentation
        [a, ..] => a >= 224,                          // multicast, reserved, broadcast
    }
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    match ip.segments() {
        [0x2001, second, ..] => second >= 0x200 && second != 0xdb8, // protocol assignments with Teredo; documentation
        [0x3fff, second, ..] => second >= 0x1000,                   // documentation
        // Global unicast; all else is loopback, unique local, link-local, multicast, or not given to anybody.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// The IPv4 address to which a packet for `ip` goes in the end: IPv4-mapped, NAT64 (RFC 6052) and 6to4 (RFC 3056).
fn embedded(ip: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(ip) = ip else { return None };
    let v4 = |high: u16, low: u16| Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match ip.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => v4(high, low),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_public_addresses_are_admitted() {
        for public in
            ["1.1.1.1", "100.63.0.1", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.0.1.1", "198.20.0.1", "223.255.255.255"]
                .iter()
                .chain(&["2606:4700::1", "2a00:1450::5", "2001:200::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"])
        {
            assert!(admits(&[], public.parse().unwrap()), "{public}");
        }
        let special = "0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.127.255.255 127.0.0.1 127.9.9.9 169.254.169.254 172.16.0.1 172.31.255.255 \
            192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.7 224.0.0.1 240.0.0.1 \
            255.255.255.255 :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1 \
            2001::1 2001:db8::1 2001:20::1 2002:7f00:1::1 2002:a9fe:a9fe::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 \
            fec0::1 ff02::1";
        for special in special.split_whitespace() {
            assert!(!admits(&[], special.parse().unwrap()), "{special}");
        }
    }

    #[test]
    fn networks_can_be_allowed() {
        let nets = ["127.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        for ok in ["127.0.0.1", "::ffff:127.0.0.1", "fd12::1", "8.8.8.8"] {
            assert!(admits(&nets, ok.parse().unwrap()), "{ok}");
        }
        assert!(!admits(&nets, "10.0.0.1".parse().unwrap()) && !admits(&nets, "::1".parse().unwrap()));
    }

    #[test]
    fn literal_addresses_are_seen_in_every_spelling() {
        for url in [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://017700000001/",
            "http://127.0.0.1./",
        ]
        .iter()
        .chain(&["http://localhost/", "http://LOCALHOST.:80/", "http://a.localhost/", "http://１２７.0.0.1/"])
        {
            assert_eq!(literal(&Url::parse(url).unwrap()), Some(Ipv4Addr::LOCALHOST.into()), "{url}");
        }
        assert_eq!(literal(&Url::parse("http://[::1]/").unwrap()), Some(Ipv6Addr::LOCALHOST.into()));
        assert_eq!(literal(&Url::parse("http://a.test/").unwrap()), None);
    }
}
