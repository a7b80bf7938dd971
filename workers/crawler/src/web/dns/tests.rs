//! The resolver against servers of the test.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, SOA};
use hickory_resolver::proto::rr::{RData, Record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket as Udp};

use super::*;

/// What a server does with a query.
#[derive(Clone)]
enum Says {
    Addresses(u32, Vec<IpAddr>),
    /// With this time to live of the denial.
    NoSuchName(u32),
    Code(ResponseCode),
    Nothing,
    Late(u64, Box<Says>),
    /// Truncated by UDP, this by TCP.
    ByTcp(Box<Says>),
    Garbage,
}

type Rule = dyn Fn(&str, RecordType) -> Says + Send + Sync;

struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    async fn start(rule: impl Fn(&str, RecordType) -> Says + Send + Sync + 'static) -> Self {
        let (udp, tcp) = loop {
            let udp = Udp::bind("127.0.0.1:0").await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (Arc::new(udp), tcp);
            }
        };
        let (address, rule): (_, Arc<Rule>) = (udp.local_addr().unwrap(), Arc::new(rule));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, by_tcp) = (Arc::clone(&asked), Arc::clone(&rule));
        tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((n, from)) = udp.recv_from(&mut buffer).await {
                let query = Message::from_vec(&buffer[..n]).unwrap();
                let (udp, says) = (Arc::clone(&udp), said(&query, &*rule, &log));
                tokio::spawn(async move {
                    if let Some(reply) = reply(query, says, false).await {
                        udp.send_to(&reply, from).await.unwrap();
                    }
                });
            }
        });
        tokio::spawn(async move {
            while let Ok((mut connection, _)) = tcp.accept().await {
                let rule = Arc::clone(&by_tcp);
                tokio::spawn(async move {
                    while let Ok(n) = connection.read_u16().await {
                        let mut bytes = vec![0; n.into()];
                        connection.read_exact(&mut bytes).await.unwrap();
                        let query = Message::from_vec(&bytes).unwrap();
                        let says = said(&query, &*rule, &Mutex::default());
                        let bytes = reply(query, says, true).await.unwrap();
                        connection.write_u16(bytes.len() as u16).await.unwrap();
                        connection.write_all(&bytes).await.unwrap();
                    }
                });
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn said(query: &Message, rule: &Rule, log: &Mutex<Vec<String>>) -> Says {
    let query = &query.queries[0];
    let name = query.name().to_ascii().to_lowercase();
    log.lock().unwrap().push(format!("{name} {}", query.query_type()));
    rule(name.trim_end_matches('.'), query.query_type())
}

async fn reply(query: Message, mut says: Says, by_tcp: bool) -> Option<Vec<u8>> {
    let mut message = Message::response(query.metadata.id, OpCode::Query);
    let asked = query.queries[0].clone();
    message.add_query(asked.clone());
    if let Says::ByTcp(then) = says {
        if !by_tcp {
            message.metadata.truncation = true;
            return message.to_vec().ok();
        }
        says = *then;
    }
    if let Says::Late(pause, then) = says {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        says = *then;
    }
    match says {
        Says::Addresses(ttl, addresses) => {
            for ip in addresses {
                match (ip, asked.query_type()) {
                    (IpAddr::V4(ip), RecordType::A) => {
                        message.add_answer(Record::from_rdata(asked.name().clone(), ttl, RData::A(A(ip))));
                    }
                    (IpAddr::V6(ip), RecordType::AAAA) => {
                        message.add_answer(Record::from_rdata(asked.name().clone(), ttl, RData::AAAA(AAAA(ip))));
                    }
                    _ => {}
                }
            }
        }
        Says::NoSuchName(ttl) => {
            message.metadata.response_code = ResponseCode::NXDomain;
            let root = Name::root();
            let soa = SOA::new(root.clone(), root.clone(), 1, 1, 1, 1, ttl);
            message.add_authority(Record::from_rdata(root, ttl, RData::SOA(soa)));
        }
        Says::Code(code) => message.metadata.response_code = code,
        Says::Garbage => return Some(vec![0xff; 40]),
        Says::Nothing | Says::Late(..) | Says::ByTcp(_) => return None,
    }
    message.to_vec().ok()
}

fn v4(last: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, last).into()
}

fn here(ttl: u32) -> Says {
    Says::Addresses(ttl, vec![v4(1)])
}

/// A resolver with short times; negative answers are kept for 200 ms at most, failures for 100 ms, addresses for 0.3 to 2 s.
fn resolver(servers: &[&Server]) -> Dns {
    Dns::new(&config(servers)).unwrap()
}

fn config(servers: &[&Server]) -> DnsConfig {
    let ms = Duration::from_millis;
    DnsConfig {
        upstreams: servers.iter().map(|s| s.address.to_string()).collect(),
        patience: ms(100),
        timeout: ms(1_000),
        ipv6: Some(false),
        min_ttl: ms(300),
        max_ttl: ms(2_000),
        max_negative_ttl: ms(200),
        failure_ttl: ms(100),
        ..DnsConfig::default()
    }
}

async fn pause(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

#[tokio::test]
async fn a_name_is_asked_for_once_and_kept_by_its_ttl() {
    let server =
        Server::start(|name, _| if name.starts_with("short") { Says::Late(50, here(0).into()) } else { here(3600) }).await;
    let dns = resolver(&[&server]);
    let all = join_all((0..500).map(|_| dns.addresses("short.test"))).await;
    assert!(all.iter().all(|a| a.as_deref().unwrap() == [v4(1)]));
    assert_eq!(server.asked(), ["short.test. A"], "those who wait share one query");
    dns.addresses("short.test").await.unwrap();
    assert_eq!(server.asked().len(), 1, "kept for min_ttl");
    pause(350).await;
    dns.addresses("short.test").await.unwrap();
    assert_eq!(server.asked().len(), 2, "its ttl of 0 is over");
    dns.addresses("long.test").await.unwrap();
    pause(400).await;
    dns.addresses("long.test").await.unwrap();
    assert_eq!(server.asked().len(), 3);
}

#[tokio::test]
async fn what_is_not_there_is_kept_too() {
    let server = Server::start(|name, _| match name {
        "none.test" => Says::NoSuchName(60),
        "empty.test" => Says::Addresses(60, vec![]),
        _ => Says::Code(ResponseCode::ServFail),
    })
    .await;
    let dns = resolver(&[&server]);
    for name in ["none.test", "empty.test"] {
        for _ in 0..3 {
            assert!(matches!(dns.addresses(name).await, Err(NoAddress::Absent)), "{name}");
        }
    }
    assert_eq!(server.asked(), ["none.test. A", "empty.test. A"]);
    pause(250).await;
    dns.addresses("none.test").await.unwrap_err();
    assert_eq!(server.asked().len(), 3, "not for longer than max_negative_ttl");
    for _ in 0..3 {
        assert!(matches!(dns.addresses("broken.test").await, Err(NoAddress::Failed { .. })));
    }
    assert_eq!(server.asked().len(), 5, "two attempts, then the failure is kept");
    pause(150).await;
    dns.addresses("broken.test").await.unwrap_err();
    assert_eq!(server.asked().len(), 7, "but only for failure_ttl");
    for bad in ["a..test", &"x".repeat(64), ""] {
        assert!(dns.addresses(bad).await.is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a_dead_server_costs_patience_once() {
    let dead = Server::start(|_, _| Says::Nothing).await;
    let good = Server::start(|_, _| here(60)).await;
    let dns = resolver(&[&dead, &good]);
    let start = Instant::now();
    dns.addresses("a.test").await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(100) && start.elapsed() < Duration::from_millis(900));
    for n in 0..10 {
        dns.addresses(&format!("{n}.test")).await.unwrap();
    }
    assert_eq!(dead.asked().iter().filter(|q| !q.starts_with("a.")).count(), 0, "it is asked last from then on");
    let refuses = Server::start(|_, _| Says::Code(ResponseCode::Refused)).await;
    let fails = Server::start(|_, _| Says::Code(ResponseCode::ServFail)).await;
    let dns = resolver(&[&refuses, &fails, &good]);
    dns.addresses("b.test").await.unwrap();
    assert_eq!((refuses.asked().len(), fails.asked().len()), (1, 1), "what fails is passed over");
}

#[tokio::test]
async fn silence_ends_and_so_does_nonsense() {
    let dead = Server::start(|_, _| Says::Nothing).await;
    let mad = Server::start(|_, _| Says::Garbage).await;
    for servers in [vec![&dead], vec![&dead, &mad], vec![&mad], vec![]] {
        let dns = if servers.is_empty() {
            // No server at all, as on a machine without resolv.conf.
            let mut dns = resolver(&[&dead]);
            Arc::get_mut(&mut dns.0).unwrap().servers.clear();
            dns
        } else {
            resolver(&servers)
        };
        let start = Instant::now();
        let all = join_all((0..50).map(|n| {
            let dns = dns.clone();
            async move { dns.addresses(&format!("{}.test", n % 5)).await }
        }))
        .await;
        assert!(all.iter().all(|a| matches!(a, Err(NoAddress::Failed { .. }))));
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn who_goes_away_takes_nothing_along() {
    let server = Server::start(|_, _| Says::Late(200, here(60).into())).await;
    let dns = Dns::new(&DnsConfig { patience: Duration::from_secs(1), ..config(&[&server]) }).unwrap();
    let first = tokio::time::timeout(Duration::from_millis(50), dns.addresses("a.test")).await;
    assert!(first.is_err());
    dns.addresses("a.test").await.unwrap();
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn truncated_answers_come_by_tcp() {
    let many: Vec<IpAddr> = (1..200).map(v4).collect();
    let wanted = many.clone();
    let server = Server::start(move |_, _| Says::ByTcp(Says::Addresses(60, many.clone()).into())).await;
    assert_eq!(*resolver(&[&server]).addresses("a.test").await.unwrap(), wanted);
}

#[tokio::test]
async fn both_families_are_asked_and_neither_holds_up_the_other() {
    let v6: IpAddr = "2001:db8::1".parse().unwrap();
    let server = Server::start(move |name, kind| match (name, kind) {
        ("both.test", _) => Says::Addresses(60, vec![v6, v4(1)]),
        ("v6.test", RecordType::AAAA) => Says::Addresses(60, vec![v6]),
        ("v6.test", _) => Says::Addresses(60, vec![]),
        ("no-aaaa.test", RecordType::AAAA) => Says::Nothing,
        ("bad-aaaa.test", RecordType::AAAA) => Says::Code(ResponseCode::ServFail),
        ("late-a.test", RecordType::A) => Says::Late(80, here(60).into()),
        ("late-a.test", _) => Says::Addresses(60, vec![v6]),
        ("half.test", RecordType::A) => Says::NoSuchName(60),
        ("half.test", _) => Says::Nothing,
        _ => here(60),
    })
    .await;
    let dns = Dns::new(&DnsConfig { ipv6: Some(true), ..config(&[&server]) }).unwrap();
    let start = Instant::now();
    assert_eq!(*dns.addresses("both.test").await.unwrap(), [v4(1), v6], "IPv4 first");
    assert_eq!(*dns.addresses("v6.test").await.unwrap(), [v6]);
    assert_eq!(*dns.addresses("late-a.test").await.unwrap(), [v4(1), v6]);
    assert_eq!(*dns.addresses("no-aaaa.test").await.unwrap(), [v4(1)]);
    assert_eq!(*dns.addresses("bad-aaaa.test").await.unwrap(), [v4(1)]);
    assert!(start.elapsed() < Duration::from_millis(900), "nobody waited for the timeout: {:?}", start.elapsed());
    assert!(matches!(dns.addresses("half.test").await, Err(NoAddress::Failed { .. })), "half of a no is no answer");
}

#[tokio::test]
async fn local_names_and_search_domains() {
    let server = Server::start(|_, _| here(60)).await;
    let dns = resolver(&[&server]);
    assert!(dns.addresses("localhost").await.unwrap().iter().all(IpAddr::is_loopback), "of the hosts file, or by RFC 6761");
    dns.addresses("intranet").await.unwrap();
    assert_eq!(server.asked(), ["intranet. A"], "no search domain is put behind a name");
}

#[tokio::test]
async fn the_memory_is_bounded_and_what_is_used_stays() {
    let count = Arc::new(AtomicUsize::new(0));
    let server = Server::start({
        let count = Arc::clone(&count);
        move |name, _| {
            count.fetch_add(usize::from(name == "often.test"), Ordering::SeqCst);
            here(3600)
        }
    })
    .await;
    let dns = Dns::new(&DnsConfig { cache: 20, ..config(&[&server]) }).unwrap();
    for n in 0..100 {
        dns.addresses(&format!("{n}.test")).await.unwrap();
        if n % 5 == 0 {
            dns.addresses("often.test").await.unwrap();
        }
    }
    let cache = dns.0.cache.lock().unwrap();
    assert!(cache.young.len() + cache.old.len() <= 20);
    assert!(count.load(Ordering::SeqCst) <= 3, "kept while it is used; at most once more a ttl");
}
