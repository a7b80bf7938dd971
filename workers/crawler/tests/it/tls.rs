//! A TLS server: the host's name (SNI) says how it misbehaves. Names that begin with `h2-` speak HTTP/2.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::server::Acceptor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::LazyConfigAcceptor;

use crate::h2;

/// The server's certificates, by what is wrong with them.
struct Certificates {
    good: Arc<ServerConfig>,
    good_h2: Arc<ServerConfig>,
    self_signed: Arc<ServerConfig>,
    expired: Arc<ServerConfig>,
    other_name: Arc<ServerConfig>,
}

fn certificates(ca_file: &Path) -> Certificates {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(vec![]).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(ca_file, ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let make = |name: &str, signed: bool, years: [i32; 2], h2: bool| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(years[0], 1, 1);
        params.not_after = rcgen::date_time_ymd(years[1], 1, 1);
        let certificate = if signed { params.signed_by(&key, &issuer) } else { params.self_signed(&key) }.unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .unwrap();
        if h2 {
            config.alpn_protocols = vec![b"h2".to_vec()];
        }
        Arc::new(config)
    };
    let now = [2000, 4000];
    Certificates {
        good: make("*.tls.test", true, now, false),
        good_h2: make("*.tls.test", true, now, true),
        self_signed: make("*.tls.test", false, now, false),
        expired: make("*.tls.test", true, [2000, 2001], false),
        other_name: make("other.test", true, now, false),
    }
}

/// Starts the server; whoever trusts `ca_file` trusts its good certificates.
pub(crate) async fn start(ca_file: &Path, image: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (certificates, image) = (Arc::new(certificates(ca_file)), Arc::new(image));
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let (certificates, image) = (Arc::clone(&certificates), Arc::clone(&image));
            tokio::spawn(async move { serve(connection, &certificates, &image).await });
        }
    });
    address
}

async fn serve(connection: TcpStream, certificates: &Certificates, image: &[u8]) -> std::io::Result<()> {
    let mut hello = LazyConfigAcceptor::new(Acceptor::default(), connection).await?;
    let name = hello.client_hello().server_name().unwrap_or_default().to_owned();
    let behaviour = name.split('.').next().unwrap_or_default().to_owned();
    let config = match behaviour.as_str() {
        "stalled" => {
            // The greeting is never answered.
            tokio::time::sleep(Duration::from_secs(600)).await;
            return Ok(());
        }
        "half" => {
            // The head of a record that says that more is to come.
            hello.io.write_all(&[0x16, 3, 3, 0x40, 0, 2, 0, 0x3f, 0xfc]).await?;
            tokio::time::sleep(Duration::from_secs(600)).await;
            return Ok(());
        }
        "garbage" => {
            return hello.io.write_all(&[0x42; 4_096]).await;
        }
        "alert" => {
            // handshake_failure
            return hello.io.write_all(&[0x15, 3, 3, 0, 2, 2, 40]).await;
        }
        "self-signed" => &certificates.self_signed,
        "expired" => &certificates.expired,
        "other-name" => &certificates.other_name,
        _ if behaviour.starts_with("h2-") => &certificates.good_h2,
        _ => &certificates.good,
    };
    let mut wire = hello.into_stream(Arc::clone(config)).await?;
    if behaviour.starts_with("h2-") {
        return h2::serve(wire, &behaviour, image).await;
    }
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(wire.read_u8().await?);
        }
        if behaviour == "silent" {
            tokio::time::sleep(Duration::from_secs(600)).await;
        }
        let found = !head.starts_with(b"GET /robots.txt");
        let (code, body) = if found { (200, image) } else { (404, b"".as_slice()) };
        let told = if behaviour == "cut" && found { body.len() * 2 } else { body.len() };
        wire.write_all(format!("HTTP/1.1 {code} x\r\nContent-Length: {told}\r\n\r\n").as_bytes()).await?;
        wire.write_all(body).await?;
        if behaviour == "cut" && found {
            // Without the alert that says that this is the end.
            return Ok(());
        }
    }
}
