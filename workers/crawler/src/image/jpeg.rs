//! JPEG by libjpeg-turbo: what a file's markers say, its pixels, and files of our own.
//!
//! The decoder scales by 1/2, 1/4 or 1/8 while it decodes. Both directions use the accurate integer DCT, whose SIMD code gives the same
//! bytes as its C code: a file comes out the same on every machine.

use std::ops::Range;

use capfilt_schemas::FetchStatus;
use turbojpeg::{Compressor, Decompressor, Image, PixelFormat, ScalingFactor, Subsamp};

use super::Refused;
use super::colour::cmyk_to_rgb;
use super::decode::{Pixels, reason};

/// Scans of a progressive file: usual ones have about ten, one of hostile making has as many as fit into it, and each costs a pass.
const MAX_SCANS: u32 = 100;
/// Warnings of libjpeg after which the picture is still whole.
const HARMLESS: [&str; 3] =
    ["extraneous bytes before marker", "Invalid SOS parameters for sequential JPEG", "Inconsistent progression sequence"];

/// What the markers before the first scan say.
#[derive(Default)]
pub(super) struct Header {
    pub(super) width: u32,
    pub(super) height: u32,
    /// Colours are inks: cyan, magenta, yellow, black.
    pub(super) is_cmyk: bool,
    /// Adobe's programs store inks inverted, and say that it is they who wrote.
    adobe: bool,
    /// The TIFF structure in the EXIF segment.
    pub(super) exif: Option<Vec<u8>>,
    /// The parts of a colour profile: number, number of all, bytes.
    profile: Vec<(u8, u8, Vec<u8>)>,
    /// Where the segments are that a decoder needs.
    needed: Vec<Range<usize>>,
    /// Where the first scan begins.
    scan: usize,
}

impl Header {
    /// Reads the markers of a file that begins with `ff d8`.
    pub(super) fn read(body: &[u8]) -> Result<Self, Refused> {
        let broken = |why: &str| Refused::new(FetchStatus::Decode, why);
        let mut header = Self::default();
        let mut at = 2;
        while let Some(&[first, marker, high, low]) = body.get(at..at + 4) {
            match (first, marker) {
                // Bytes that belong to nothing, and fill bytes, may stand before a marker.
                (0..0xff, _) | (0xff, 0 | 0xff) => at += 1,
                (0xff, 0x01 | 0xd0..=0xd8) => at += 2,
                (0xff, 0xd9) => break,
                (0xff, 0xda) if header.width == 0 => break,
                // Decoders fill what is missing with grey; half a picture is no sample.
                (0xff, 0xda) if memchr::memmem::rfind(&body[at..], b"\xff\xd9").is_none() => {
                    return Err(broken("the jpeg ends early"));
                }
                (0xff, 0xda) => {
                    header.scan = at;
                    return Ok(header);
                }
                (0xff, _) => {
                    let length = usize::from(u16::from_be_bytes([high, low]));
                    let segment = body.get(at + 4..at + 2 + length).ok_or_else(|| broken("the jpeg ends early"))?;
                    header.segment(marker, segment)?;
                    if !matches!(marker, 0xe0..=0xed | 0xef | 0xfe) {
                        header.needed.push(at..at + 2 + length);
                    }
                    at += 2 + length;
                }
            }
        }
        Err(broken(if body.len() < at + 4 { "the jpeg ends early" } else { "the jpeg has no picture" }))
    }

    fn segment(&mut self, marker: u8, segment: &[u8]) -> Result<(), Refused> {
        match marker {
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => {
                let &[_, h1, h0, w1, w0, components, ..] = segment else {
                    return Err(Refused::new(FetchStatus::Decode, "the jpeg's frame header is too short"));
                };
                (self.width, self.height) = (u16::from_be_bytes([w1, w0]).into(), u16::from_be_bytes([h1, h0]).into());
                if self.width == 0 || self.height == 0 {
                    return Err(Refused::new(FetchStatus::Decode, "the image has no pixels"));
                }
                self.is_cmyk = components == 4;
            }
            0xe1 if self.exif.is_none() => self.exif = segment.strip_prefix(b"Exif\0\0").map(<[u8]>::to_vec),
            0xe2 => {
                if let Some([number, all, part @ ..]) = segment.strip_prefix(b"ICC_PROFILE\0") {
                    self.profile.push((*number, *all, part.to_vec()));
                }
            }
            0xee => self.adobe |= segment.starts_with(b"Adobe"),
            _ => {}
        }
        Ok(())
    }

    /// The colour profile, if all of it is there.
    pub(super) fn profile(&mut self) -> Option<Vec<u8>> {
        let mut parts = std::mem::take(&mut self.profile);
        parts.sort_by_key(|part| part.0);
        let all = usize::from(parts.first()?.1);
        let whole = parts.len() == all && parts.iter().enumerate().all(|(i, part)| usize::from(part.0) == i + 1);
        whole.then(|| parts.into_iter().flat_map(|part| part.2).collect())
    }

    /// The pixels in the smallest size that is a half, a quarter or an eighth and not smaller than `at_least`, or in full size.
    pub(super) fn decode(&self, body: &[u8], at_least: (u32, u32), profile: Option<&[u8]>) -> Result<Pixels, Refused> {
        let fail = |e: turbojpeg::Error| Refused::new(FetchStatus::Decode, reason(&e));
        let factor = [ScalingFactor::ONE_EIGHTH, ScalingFactor::ONE_QUARTER, ScalingFactor::ONE_HALF]
            .into_iter()
            .find(|f| self.width.div_ceil(f.denom() as u32) >= at_least.0 && self.height.div_ceil(f.denom() as u32) >= at_least.1)
            .unwrap_or(ScalingFactor::ONE);
        let mut decoder = Decompressor::new().map_err(fail)?;
        decoder.set_scan_limit(MAX_SCANS).map_err(fail)?;
        let mut cleaned = Vec::new();
        let (body, header) = match decoder.read_header(body) {
            Ok(header) => (body, header),
            // It warns of strays between the segments and of odd segments that it does not need, and gives up.
            Err(_) => {
                cleaned.extend_from_slice(b"\xff\xd8");
                self.needed.iter().for_each(|range| cleaned.extend_from_slice(&body[range.clone()]));
                cleaned.extend_from_slice(&body[self.scan..]);
                let header = decoder.read_header(&cleaned).map_err(fail)?;
                (cleaned.as_slice(), header)
            }
        };
        // Of two frame headers, the library and we might believe different ones.
        if (header.width, header.height) != (self.width as usize, self.height as usize) {
            return Err(Refused::new(FetchStatus::Decode, "the jpeg has two frame headers"));
        }
        let factor = if header.is_lossless { ScalingFactor::ONE } else { factor };
        decoder.set_scaling_factor(factor).map_err(fail)?;
        let size = header.scaled(factor);
        let format = if self.is_cmyk { PixelFormat::CMYK } else { PixelFormat::RGB };
        let pitch = size.width * format.size();
        let mut pixels = vec![0; pitch * size.height];
        let target = Image { pixels: pixels.as_mut_slice(), width: size.width, pitch, height: size.height, format };
        if let Err(e) = decoder.decompress(body, target)
            && !HARMLESS.iter().any(|warning| e.to_string().contains(warning))
        {
            return Err(fail(e));
        }
        let rgb = if self.is_cmyk { cmyk_to_rgb(pixels, self.adobe, profile) } else { pixels };
        Ok(Pixels { rgb, size: (size.width as u32, size.height as u32) })
    }
}

/// A baseline JPEG, colour at half resolution (4:2:0), of RGB pixels.
pub(super) fn encode(rgb: &[u8], (width, height): (u32, u32), quality: u8) -> Result<Vec<u8>, Refused> {
    let fail = |e: turbojpeg::Error| Refused::new(FetchStatus::Decode, reason(&e));
    let (width, height) = (width as usize, height as usize);
    let mut encoder = Compressor::new().map_err(fail)?;
    encoder.set_quality(quality.into()).map_err(fail)?;
    encoder.set_subsamp(Subsamp::Sub2x2).map_err(fail)?;
    encoder.compress_to_vec(Image { pixels: rgb, width, pitch: width * 3, height, format: PixelFormat::RGB }).map_err(fail)
}
