//! An HTTP/2 server made of bare frames (RFC 9113), so that it can send what no library would.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// `:status: 200` in HPACK's static table.
const OK: u8 = 0x88;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// A header that goes into the other side's table, which all later uses of it name with one byte.
fn new_header(name: &str, value: &str) -> Vec<u8> {
    let mut out = vec![0x40, name.len() as u8];
    out.extend(name.bytes());
    // The length of a value of 127 bytes and more goes on in further bytes of seven bits.
    let mut rest = value.len() - 127;
    out.push(127);
    while rest >= 128 {
        out.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    out.push(rest as u8);
    out.extend(value.bytes());
    out
}

/// Serves one connection; every request is answered in one way, and with `image` if it is no known one.
pub(crate) async fn serve(mut wire: impl AsyncRead + AsyncWrite + Unpin, behaviour: &str, image: &[u8]) -> std::io::Result<()> {
    let mut preface = [0; 24];
    wire.read_exact(&mut preface).await?;
    wire.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    let mut requests = 0;
    loop {
        let mut head = [0; 9];
        wire.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; length];
        wire.read_exact(&mut payload).await?;
        if head[3] == SETTINGS && head[4] == 0 {
            wire.write_all(&frame(SETTINGS, 1, 0, &[])).await?;
        }
        if head[3] == PING && head[4] == 0 && behaviour != "h2-mute" {
            wire.write_all(&frame(PING, 1, 0, &payload)).await?;
        }
        if head[3] != HEADERS {
            continue;
        }
        requests += 1;
        let good = [frame(HEADERS, END_HEADERS, stream, &[OK]), frame(DATA, END_STREAM, stream, image)].concat();
        let headers = |more: &[u8]| frame(HEADERS, END_HEADERS, stream, &[&[OK], more].concat());
        let endless: Vec<u8> = match behaviour {
            "h2-goaway" => frame(GOAWAY, 0, 0, &[0; 8]),
            "h2-goaway-then-good" if requests == 1 => {
                // The stream is promised not to have been looked at: it may be asked for again.
                wire.write_all(&frame(GOAWAY, 0, 0, &[0; 8])).await?;
                wire.shutdown().await?;
                return Ok(());
            }
            "h2-reset" => {
                wire.write_all(&frame(RST_STREAM, 0, stream, &2_u32.to_be_bytes())).await?;
                continue;
            }
            "h2-reset-in-body" => {
                let body = frame(DATA, 0, stream, &image[..20]);
                wire.write_all(&[headers(&[]), body, frame(RST_STREAM, 0, stream, &2_u32.to_be_bytes())].concat()).await?;
                continue;
            }
            "h2-stall" | "h2-mute" => continue,
            "h2-stall-in-body" => {
                wire.write_all(&[headers(&[]), frame(DATA, 0, stream, &image[..20])].concat()).await?;
                continue;
            }
            "h2-continuation-flood" => {
                wire.write_all(&frame(HEADERS, 0, stream, &[OK])).await?;
                frame(CONTINUATION, 0, stream, &[0, 1, b'a', 1, b'b'].repeat(1_000))
            }
            "h2-empty-continuation-flood" => {
                wire.write_all(&frame(HEADERS, 0, stream, &[OK])).await?;
                frame(CONTINUATION, 0, stream, &[]).repeat(1_000)
            }
            "h2-header-bomb" => {
                // One header of 4 kB, ten thousand times.
                let bomb = [new_header("x", &"y".repeat(3_900)), vec![0xbe; 10_000]].concat();
                wire.write_all(&headers(&bomb)).await?;
                continue;
            }
            "h2-ping-flood" => frame(PING, 0, 0, &[7; 8]).repeat(20),
            "h2-settings-flood" => frame(SETTINGS, 0, 0, &[]).repeat(20),
            "h2-empty-data-flood" => {
                wire.write_all(&headers(&[])).await?;
                frame(DATA, 0, stream, &[]).repeat(1_000)
            }
            "h2-endless" => {
                wire.write_all(&headers(&[])).await?;
                frame(DATA, 0, stream, &[0; 16_384]).repeat(8)
            }
            "h2-huge-frame" => {
                wire.write_all(&[headers(&[]), frame(DATA, END_STREAM, stream, &vec![0; 1 << 20])].concat()).await?;
                continue;
            }
            "h2-no-such-stream" => frame(DATA, 0, stream + 100, image),
            "h2-garbage" => vec![0xff; 8_192],
            _ => {
                wire.write_all(&good).await?;
                continue;
            }
        };
        // What would be a flood is one, until the client has enough.
        loop {
            wire.write_all(&endless).await?;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
