//! A DNS server, some of whose names misbehave.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::A;
use hickory_resolver::proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;

pub(crate) struct Names {
    pub(crate) address: SocketAddr,
    asked: Arc<Mutex<HashMap<String, usize>>>,
}

impl Names {
    /// Starts it. All names are on this machine but those that say otherwise.
    pub(crate) async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let asked: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
        let counts = Arc::clone(&asked);
        tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((n, from)) = socket.recv_from(&mut buffer).await {
                let Ok(query) = Message::from_vec(&buffer[..n]) else { continue };
                let name = query.queries[0].name().to_ascii().to_lowercase().trim_end_matches('.').to_owned();
                let before = {
                    let mut counts = counts.lock().unwrap();
                    let count = counts.entry(name.clone()).or_default();
                    *count += 1;
                    *count - 1
                };
                if let Some(reply) = reply(&query, &name, before) {
                    socket.send_to(&reply, from).await.unwrap();
                }
            }
        });
        Self { address, asked }
    }

    /// How often a name was asked for.
    pub(crate) fn asked(&self, name: &str) -> usize {
        self.asked.lock().unwrap().get(name).copied().unwrap_or(0)
    }
}

fn reply(query: &Message, name: &str, before: usize) -> Option<Vec<u8>> {
    let mut message = Message::response(query.metadata.id, OpCode::Query);
    let asked = query.queries[0].clone();
    message.add_query(asked.clone());
    let addresses: Vec<Ipv4Addr> = match name {
        "black-hole.test" => return None,
        "late-name.test" if before == 0 => return None,
        "no-such-name.test" => {
            message.metadata.response_code = ResponseCode::NXDomain;
            vec![]
        }
        "servfail.test" => {
            message.metadata.response_code = ResponseCode::ServFail;
            vec![]
        }
        "no-address.test" => vec![],
        "private-name.test" => vec![[10, 0, 0, 1].into()],
        "metadata-name.test" => vec![[169, 254, 169, 254].into()],
        "unspecified-name.test" => vec![Ipv4Addr::UNSPECIFIED],
        // Public when it is looked at, private when it is used: the trick of DNS rebinding.
        "rebinding.test" if before > 0 => vec![[192, 168, 0, 1].into()],
        "mixed.test" => vec![[10, 0, 0, 1].into(), Ipv4Addr::LOCALHOST],
        // The first of its addresses does not answer.
        "half-dead.test" => vec![[127, 0, 0, 99].into(), Ipv4Addr::LOCALHOST],
        _ => vec![Ipv4Addr::LOCALHOST],
    };
    if asked.query_type() == RecordType::A {
        for ip in addresses {
            assert!(IpAddr::from(ip).is_ipv4());
            message.add_answer(Record::from_rdata(asked.name().clone(), 1, RData::A(A(ip))));
        }
    }
    message.to_vec().ok()
}
