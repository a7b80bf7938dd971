//! Colours of other spaces as sRGB.

use std::cell::RefCell;
use std::sync::Arc;

use capfilt_schemas::Digest;
use moxcms::{ColorProfile, DataColorSpace, Layout, Transform8BitExecutor, TransformOptions};

/// Profiles whose conversion each thread remembers: most pictures have one of a few.
const REMEMBERED: usize = 16;
/// Bytes of a profile; the largest that printers' colours need have about two million.
const MAX_PROFILE: usize = 4 << 20;
/// Pixels converted at a time.
const AT_ONCE: usize = 4096;
/// A profile that moves no colour further than this is sRGB by another name.
const SAME: u8 = 2;

/// Values of the channels of the colours that are tried.
const STEPS: [u8; 6] = [0, 32, 64, 128, 192, 255];

/// A conversion of 8-bit colours into sRGB.
#[derive(Clone)]
struct Conversion {
    /// Channels of the source: grey 1, RGB 3, CMYK 4.
    channels: usize,
    executor: Arc<Transform8BitExecutor>,
}

thread_local! {
    /// By the digest of the profile; `None` for those that say nothing or nothing usable.
    static CONVERSIONS: RefCell<Vec<(Digest, Option<Conversion>)>> = const { RefCell::new(Vec::new()) };
}

impl Conversion {
    /// The conversion that a profile asks for; `None` if it is sRGB, or broken: then the colours are taken as they are.
    fn of(profile: &[u8]) -> Option<Self> {
        if profile.len() > MAX_PROFILE {
            return None;
        }
        let key = Digest::of(profile);
        CONVERSIONS.with_borrow_mut(|known| {
            if let Some(at) = known.iter().position(|entry| entry.0 == key) {
                known[..=at].rotate_right(1);
            } else {
                known.truncate(REMEMBERED - 1);
                known.insert(0, (key, Self::build(profile)));
            }
            known[0].1.clone()
        })
    }

    fn build(profile: &[u8]) -> Option<Self> {
        let profile = ColorProfile::new_from_slice(profile).ok()?;
        let (channels, layout) = match profile.color_space {
            DataColorSpace::Gray => (1, Layout::Gray),
            DataColorSpace::Rgb => (3, Layout::Rgb),
            DataColorSpace::Cmyk => (4, Layout::Rgba),
            _ => return None,
        };
        let options = TransformOptions { rendering_intent: profile.rendering_intent, ..TransformOptions::default() };
        let executor = profile.create_transform_8bit(layout, &ColorProfile::new_srgb(), Layout::Rgb, options).ok()?;
        let conversion = Self { channels, executor };
        if channels == 4 {
            return Some(conversion);
        }
        let greys: Vec<u8> = STEPS.iter().flat_map(|v| [*v; 3]).collect();
        let (probe, expected) = if channels == 1 {
            (STEPS.to_vec(), greys)
        } else {
            let cube = STEPS.iter().flat_map(|r| STEPS.iter().flat_map(move |g| STEPS.iter().map(move |b| [*r, *g, *b])));
            let cube: Vec<u8> = cube.flatten().collect();
            (cube.clone(), cube)
        };
        let moves = conversion.run(&probe)?.iter().zip(&expected).any(|(a, b)| a.abs_diff(*b) > SAME);
        moves.then_some(conversion)
    }

    /// RGB of as many pixels as there are.
    fn run(&self, pixels: &[u8]) -> Option<Vec<u8>> {
        let mut rgb = vec![0; pixels.len() / self.channels * 3];
        for (from, to) in pixels.chunks(AT_ONCE * self.channels).zip(rgb.chunks_mut(AT_ONCE * 3)) {
            self.executor.transform(from, to).ok()?;
        }
        Some(rgb)
    }
}

/// Whether pixels with this profile would change.
pub(super) fn is_other(profile: &[u8]) -> bool {
    Conversion::of(profile).is_some()
}

/// RGB pixels as sRGB. A profile for grey is heeded if all pixels are grey; one that is broken or of another kind is passed over.
pub(super) fn to_srgb(rgb: Vec<u8>, profile: &[u8]) -> Vec<u8> {
    let Some(conversion) = Conversion::of(profile) else { return rgb };
    let converted = match conversion.channels {
        3 => conversion.run(&rgb),
        1 if rgb.chunks_exact(3).all(|p| p[0] == p[1] && p[1] == p[2]) => {
            conversion.run(&rgb.iter().copied().step_by(3).collect::<Vec<_>>())
        }
        _ => None,
    };
    converted.unwrap_or(rgb)
}

/// CMYK pixels as RGB: by the profile if it is one for inks, else each colour is what its ink and black leave of white. `inverted`:
/// 255 is no ink.
pub(super) fn cmyk_to_rgb(mut pixels: Vec<u8>, inverted: bool, profile: Option<&[u8]>) -> Vec<u8> {
    let conversion = profile.and_then(Conversion::of).filter(|conversion| conversion.channels == 4);
    // Profiles count ink, the plain formula what is left of the paper.
    if inverted == conversion.is_some() {
        pixels.iter_mut().for_each(|value| *value = 255 - *value);
    }
    if let Some(rgb) = conversion.and_then(|conversion| conversion.run(&pixels)) {
        return rgb;
    }
    let part = |colour: u8, black: u8| ((u32::from(colour) * u32::from(black) + 127) / 255) as u8;
    pixels.chunks_exact(4).flat_map(|p| [part(p[0], p[3]), part(p[1], p[3]), part(p[2], p[3])]).collect()
}
