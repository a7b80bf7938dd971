//! Files that may be gzipped: their first two bytes tell it, not their names.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;

const GZIP: [u8; 2] = [0x1f, 0x8b];
/// Bytes read at once.
const BUFFER: usize = 1 << 18;

/// The content of a file, unpacked if it is gzipped.
pub(crate) fn open(path: &Path) -> io::Result<Box<dyn BufRead + Send>> {
    let mut file = BufReader::with_capacity(BUFFER, File::open(path)?);
    let packed = file.fill_buf()?.starts_with(&GZIP);
    Ok(if packed { Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(file))) } else { Box::new(file) })
}

/// Whether a file is gzipped.
pub(crate) fn is_packed(path: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(path)?.take(2).read_to_end(&mut head)?;
    Ok(head == GZIP)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write as _;

    #[test]
    fn content_tells_what_is_packed() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(b"a heron").unwrap();
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes, content, packed) in [
            ("plain.gz", b"a heron".to_vec(), "a heron", false),
            ("packed.txt", gz.finish().unwrap(), "a heron", true),
            ("empty", Vec::new(), "", false),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let mut read = String::new();
            open(&path).unwrap().read_to_string(&mut read).unwrap();
            assert_eq!((read.as_str(), is_packed(&path).unwrap()), (content, packed), "{name}");
        }
    }
}
