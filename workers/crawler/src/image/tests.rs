#![allow(clippy::unwrap_used)]
use super::*;
use crate::config::Interpolation;
use image::codecs::gif::GifEncoder;
use image::{Frame, ImageFormat, Rgb, Rgba, RgbaImage};
use jpeg_encoder::{ColorType, Encoder};
use proptest::prelude::*;
use std::io::Cursor;

const RED: [u8; 3] = [220, 30, 30];
const BLUE: [u8; 3] = [20, 40, 200];

fn config() -> ImageConfig {
    ImageConfig { format: StoredFormat::Png, ..ImageConfig::default() }
}

/// Red on the left, blue on the right.
fn two_halves(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, _| Rgb(if x < width / 2 { RED } else { BLUE }))
}

fn file(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    image.write_to(&mut out, format).unwrap();
    out.into_inner()
}

fn jpeg(image: &RgbImage) -> Vec<u8> {
    let mut out = Vec::new();
    let (w, h) = (image.width() as u16, image.height() as u16);
    Encoder::new(&mut out, 90).encode(image.as_raw(), w, h, ColorType::Rgb).unwrap();
    out
}

fn pixels(stored: &StoredImage) -> RgbImage {
    image::load_from_memory(&stored.bytes).unwrap().into_rgb8()
}

fn is_near(found: Rgb<u8>, wanted: [u8; 3], by: u8) -> bool {
    found.0.iter().zip(wanted).all(|(f, w)| f.abs_diff(w) <= by)
}

fn refused(body: &[u8]) -> FetchStatus {
    store(body, &config()).unwrap_err().status
}

#[test]
fn every_format_is_told_by_its_bytes() {
    let image: DynamicImage = two_halves(60, 40).into();
    let mut files = vec![("jpeg", jpeg(image.as_rgb8().unwrap()))];
    for (name, format) in
        [("png", ImageFormat::Png), ("gif", ImageFormat::Gif), ("webp", ImageFormat::WebP), ("bmp", ImageFormat::Bmp)]
    {
        files.push((name, file(&image, format)));
    }
    for (name, body) in files {
        let stored = store(&body, &config()).unwrap();
        assert_eq!((stored.width, stored.height, stored.original_width, stored.original_height), (60, 40, 60, 40), "{name}");
        assert_eq!(stored.sha256, Digest::of(&body));
        let found = pixels(&stored);
        assert!(is_near(*found.get_pixel(10, 20), RED, 8) && is_near(*found.get_pixel(50, 20), BLUE, 8), "{name}");
    }
}

#[test]
fn large_images_are_scaled_down_and_encoded_as_asked() {
    let body = file(&two_halves(800, 400).into(), ImageFormat::Png);
    let small = store(&body, &ImageConfig { size: 100, ..ImageConfig::default() }).unwrap();
    assert_eq!((small.width, small.height, small.original_width), (200, 100, 800));
    assert!(small.bytes.starts_with(b"\xff\xd8\xff"));
    assert!(is_near(*pixels(&small).get_pixel(30, 50), RED, 8));
    let longer = store(&body, &ImageConfig { size: 100, resize: ResizeMode::KeepRatioLargest, ..config() }).unwrap();
    assert_eq!((longer.width, longer.height), (100, 50));
    assert!(longer.bytes.starts_with(b"\x89PNG"));
    assert_eq!(store(&body, &config()).unwrap(), store(&body, &config()).unwrap(), "same body, same bytes");
}

#[test]
fn what_is_see_through_lies_on_white() {
    let mut drawing = RgbaImage::from_pixel(40, 40, Rgba([0, 0, 0, 0]));
    drawing.put_pixel(5, 5, Rgba([0, 0, 0, 255]));
    drawing.put_pixel(6, 6, Rgba([255, 0, 0, 128]));
    let found = pixels(&store(&file(&drawing.into(), ImageFormat::Png), &config()).unwrap());
    assert_eq!(found.get_pixel(0, 0).0, [255, 255, 255]);
    assert_eq!(found.get_pixel(5, 5).0, [0, 0, 0]);
    assert_eq!(found.get_pixel(6, 6).0, [255, 127, 127]);
}

#[test]
fn grey_sixteen_bit_and_cmyk_become_rgb() {
    let grey16 = image::ImageBuffer::from_fn(32, 32, |x, _| image::Luma([if x < 16 { 0x8000_u16 } else { 0xffff }]));
    let found = pixels(&store(&file(&DynamicImage::ImageLuma16(grey16), ImageFormat::Png), &config()).unwrap());
    assert!(is_near(*found.get_pixel(3, 3), [128; 3], 1) && is_near(*found.get_pixel(20, 3), [255; 3], 0));
    let deep = image::ImageBuffer::from_pixel(32, 32, Rgba([0xffff_u16, 0, 0, 0xffff]));
    let found = pixels(&store(&file(&DynamicImage::ImageRgba16(deep), ImageFormat::Png), &config()).unwrap());
    assert_eq!(found.get_pixel(0, 0).0, [255, 0, 0]);
    // Ink values of a strong red: no cyan, full magenta and yellow, no black.
    let ink: Vec<u8> = [0_u8, 255, 255, 0].repeat(32 * 32);
    for kind in [ColorType::Cmyk, ColorType::CmykAsYcck] {
        let mut body = Vec::new();
        Encoder::new(&mut body, 95).encode(&ink, 32, 32, kind).unwrap();
        let found = pixels(&store(&body, &config()).unwrap());
        assert!(is_near(*found.get_pixel(10, 10), [255, 0, 0], 8), "{kind:?}: {:?}", found.get_pixel(10, 10));
    }
    // Only what Adobe's programs wrote is inverted.
    let inverted: Vec<u8> = ink.iter().map(|value| 255 - value).collect();
    let mut body = Vec::new();
    Encoder::new(&mut body, 95).encode(&inverted, 32, 32, ColorType::Cmyk).unwrap();
    let adobe = body.windows(2).position(|w| w == [0xff, 0xee]).unwrap();
    body.drain(adobe..adobe + 16);
    let found = pixels(&store(&body, &config()).unwrap());
    assert!(is_near(*found.get_pixel(10, 10), [255, 0, 0], 8), "no Adobe: {:?}", found.get_pixel(10, 10));
}

/// A JPEG of a landscape picture, red on the left, whose EXIF says how to turn it.
fn turned(orientation: u8) -> Vec<u8> {
    let exif = [b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".as_slice(), &[orientation, 0, 0, 0, 0, 0, 0, 0]].concat();
    let mut out = Vec::new();
    let mut encoder = Encoder::new(&mut out, 95);
    encoder.add_exif_metadata(&exif).unwrap();
    encoder.encode(two_halves(80, 40).as_raw(), 80, 40, ColorType::Rgb).unwrap();
    out
}

#[test]
fn exif_orientation_is_applied() {
    let cases = [
        (1, (80, 40), (5, 20)),
        (2, (80, 40), (75, 20)),
        (3, (80, 40), (75, 20)),
        (6, (40, 80), (20, 5)),
        (8, (40, 80), (20, 75)),
    ];
    for (orientation, size, red_at) in cases {
        let stored = store(&turned(orientation), &config()).unwrap();
        assert_eq!((stored.width, stored.height), size, "{orientation}");
        assert_eq!((stored.original_width, stored.original_height), size, "{orientation}");
        assert!(is_near(*pixels(&stored).get_pixel(red_at.0, red_at.1), RED, 10), "{orientation}");
    }
}

#[test]
fn of_an_animation_the_first_frame_is_taken() {
    let mut body = Vec::new();
    let frame = |colour: [u8; 3]| Frame::new(RgbaImage::from_pixel(30, 30, Rgba([colour[0], colour[1], colour[2], 255])));
    GifEncoder::new(&mut body).encode_frames([frame(RED), frame(BLUE)]).unwrap();
    assert!(is_near(*pixels(&store(&body, &config()).unwrap()).get_pixel(15, 15), RED, 8));
}

/// The first 33 bytes of a PNG that claims a size, with a right checksum, and then nothing that could be decoded.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let crc = chunk
        .iter()
        .fold(u32::MAX, |crc, b| (0..8).fold(crc ^ u32::from(*b), |c, _| (c >> 1) ^ (0xedb8_8320 & (c & 1).wrapping_neg())));
    let mut out = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    out.extend(chunk);
    out.extend((!crc).to_be_bytes());
    out.extend(b"\0\0\0\x08IDATxxxxxxxxxxxx");
    out
}

#[test]
fn bombs_are_refused_by_their_header() {
    assert_eq!(refused(&png_header(20_000, 20_000)), FetchStatus::TooManyPixels);
    assert_eq!(refused(&png_header(u32::MAX / 2, u32::MAX / 2)), FetchStatus::TooManyPixels);
    let mut gif = file(&two_halves(40, 40).into(), ImageFormat::Gif);
    gif[6..10].copy_from_slice(&[0xff, 0xff, 0xff, 0xff]);
    assert_eq!(refused(&gif), FetchStatus::TooManyPixels);
    assert_eq!(refused(&png_header(100, 100)), FetchStatus::Decode, "a sane size with nonsense behind it");
}

/// A PNG with a colour profile of zeros.
fn with_packed_profile(size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = PngEncoder::new(&mut out);
    encoder.set_icc_profile(vec![0; size]).unwrap();
    encoder.write_image(two_halves(40, 40).as_raw(), 40, 40, image::ExtendedColorType::Rgb8).unwrap();
    out
}

#[test]
fn a_profile_is_unpacked_up_to_a_limit() {
    for (size, unpacked) in [(1 << 20, true), (65 << 20, false)] {
        let body = with_packed_profile(size);
        assert!(body.len() < size / 100);
        assert_eq!(decode::open(&body).unwrap().profile.is_some(), unpacked);
        assert!(store(&body, &config()).is_ok());
    }
}

#[test]
fn small_and_long_images_are_refused() {
    assert_eq!(refused(&file(&two_halves(1, 1).into(), ImageFormat::Gif)), FetchStatus::TooSmall);
    assert_eq!(refused(&file(&two_halves(500, 23).into(), ImageFormat::Png)), FetchStatus::TooSmall);
    assert_eq!(refused(&file(&two_halves(900, 30).into(), ImageFormat::Png)), FetchStatus::Aspect);
    assert!(store(&file(&two_halves(240, 30).into(), ImageFormat::Png), &config()).is_ok());
}

#[test]
fn what_is_no_image_is_called_by_its_name() {
    let say = |body: &[u8]| store(body, &config()).unwrap_err();
    assert_eq!(say(b""), Refused::new(FetchStatus::Empty, "the body is empty"));
    assert_eq!(say(b"\n<!DOCTYPE html><p>no"), Refused::new(FetchStatus::NotImage, "the body is an html page"));
    assert_eq!(
        say(b"\0\0\0\x20ftypavif...."),
        Refused::new(FetchStatus::NotImage, "the body is an avif image, which is not supported")
    );
    assert_eq!(say(b"<svg xmlns='x'/>").status, FetchStatus::NotImage);
    assert_eq!(say(b"GIF"), Refused::new(FetchStatus::NotImage, "the body is no known image format"));
}

#[test]
fn half_a_file_is_no_image() {
    let image = two_halves(120, 120);
    let whole = [
        jpeg(&image),
        file(&image.clone().into(), ImageFormat::Png),
        file(&image.clone().into(), ImageFormat::WebP),
        file(&image.into(), ImageFormat::Gif),
    ];
    for body in &whole {
        for share in [3, 50, 90] {
            let cut = &body[..body.len() * share / 100];
            assert!(store(cut, &config()).is_err(), "{share} % of {:?}", &body[..4]);
        }
    }
    let mut trailing = whole[0].clone();
    trailing.extend(b"rubbish after the end");
    assert!(store(&trailing, &config()).is_ok());
    // The end marker of a thumbnail in the EXIF is not the end of the picture.
    let mut with_thumbnail = whole[0][..2].to_vec();
    with_thumbnail.extend(b"\xff\xe1\0\x06\xff\xd9\xff\xd9");
    with_thumbnail.extend(&whole[0][2..whole[0].len() - 40]);
    assert_eq!(refused(&with_thumbnail), FetchStatus::Decode);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damaged_files_never_panic(at in 2_usize..2000, value: u8, cut in 2_usize..4000, which in 0_usize..4) {
        let image: DynamicImage = two_halves(48, 32).into();
        let mut body = match which {
            0 => jpeg(image.as_rgb8().unwrap()),
            1 => file(&image, ImageFormat::Png),
            2 => file(&image, ImageFormat::Gif),
            _ => file(&image, ImageFormat::WebP),
        };
        let at = at % body.len();
        body[at] = value;
        body.truncate(cut.max(4));
        let _ = store_unguarded(&body, &config());
    }
}

#[test]
fn resize_modes_cut_pad_and_scale_up() {
    let body = file(&two_halves(400, 200).into(), ImageFormat::Png);
    let of = |resize, size, only_if_bigger| {
        let stored = store(&body, &ImageConfig { resize, size, only_if_bigger, ..config() }).unwrap();
        assert_eq!((stored.original_width, stored.original_height), (400, 200));
        pixels(&stored)
    };
    let cut = of(ResizeMode::CenterCrop, 100, true);
    assert_eq!(cut.dimensions(), (100, 100));
    assert!(is_near(*cut.get_pixel(45, 50), RED, 8) && is_near(*cut.get_pixel(55, 50), BLUE, 8), "the middle is kept");
    let padded = of(ResizeMode::Border, 100, true);
    assert_eq!(padded.dimensions(), (100, 100));
    assert!([24, 75].iter().all(|y| padded.get_pixel(20, *y).0 == [255; 3]) && is_near(*padded.get_pixel(20, 26), RED, 8));
    let larger = of(ResizeMode::KeepRatio, 300, false);
    assert_eq!(larger.dimensions(), (600, 300));
    assert!(is_near(*larger.get_pixel(100, 150), RED, 8));
    assert_eq!(of(ResizeMode::KeepRatio, 300, true).dimensions(), (400, 200));
    assert_eq!(of(ResizeMode::No, 10, false).dimensions(), (400, 200));
    for downscale in [Interpolation::Nearest, Interpolation::Bilinear, Interpolation::Bicubic, Interpolation::Area] {
        let small = pixels(&store(&body, &ImageConfig { downscale, size: 64, ..config() }).unwrap());
        assert!(is_near(*small.get_pixel(10, 20), RED, 8), "{downscale:?}");
    }
    let huge = ImageConfig { size: 60_000, only_if_bigger: false, ..config() };
    assert_eq!(store(&body, &huge).unwrap_err().status, FetchStatus::TooManyPixels);
    let chosen = ImageConfig { max_pixels: 400 * 200, size: 300, only_if_bigger: false, ..config() };
    assert!(store(&body, &chosen).is_ok(), "a limit on images is none on what is made of them");
}

#[test]
fn formats_and_their_quality() {
    let photo = RgbImage::from_fn(90, 60, |x, y| Rgb([(x * y) as u8, (x * 3) as u8, (y * 4) as u8]));
    let body = file(&photo.into(), ImageFormat::Png);
    let size = |format, quality| {
        let config = ImageConfig { format, quality, ..config() };
        let stored = store(&body, &config).unwrap();
        assert_eq!(stored.format, format.name());
        assert_eq!(pixels(&stored).dimensions(), (90, 60));
        assert_eq!(stored, store(&body, &config).unwrap(), "same body, same bytes");
        stored.bytes.len()
    };
    for format in [StoredFormat::Jpeg, StoredFormat::WebP] {
        assert!(size(format, Some(30)) < size(format, Some(80)) && size(format, Some(80)) < size(format, None), "{format:?}");
    }
    assert!(size(StoredFormat::Png, Some(0)) > size(StoredFormat::Png, Some(1)));
    assert!(size(StoredFormat::Png, Some(9)) <= size(StoredFormat::Png, Some(1)));
}

#[test]
fn files_are_kept_as_they_came_where_that_is_asked() {
    let if_needed = ImageConfig { reencode: Reencode::IfNeeded, format: StoredFormat::Jpeg, size: 100, ..ImageConfig::default() };
    let kept = |body: &[u8], config: &ImageConfig| store(body, config).unwrap().bytes == body;
    let small = jpeg(&two_halves(90, 60));
    assert!(kept(&small, &if_needed));
    assert!(!kept(&small, &ImageConfig { reencode: Reencode::Always, ..if_needed }));
    assert!(!kept(&jpeg(&two_halves(300, 200)), &if_needed), "it is scaled");
    assert!(!kept(&turned(6), &if_needed), "it is turned");
    assert!(!kept(&file(&two_halves(90, 60).into(), ImageFormat::Png), &if_needed), "it is another format");
    let png = ImageConfig { format: StoredFormat::Png, ..if_needed };
    let clear = RgbaImage::from_pixel(40, 40, Rgba([9, 9, 9, 255]));
    assert!(!kept(&file(&clear.into(), ImageFormat::Png), &png), "it has an alpha channel");
    let never = ImageConfig { reencode: Reencode::Never, size: 32, ..ImageConfig::default() };
    let gif = file(&two_halves(300, 200).into(), ImageFormat::Gif);
    let stored = store(&gif, &never).unwrap();
    assert_eq!((stored.bytes == gif, stored.format, stored.width, stored.height), (true, "gif", 300, 200));
    assert_eq!(
        (store(&turned(6), &never).unwrap().width, store(&turned(6), &never).unwrap().phash),
        (40, store(&turned(6), &config()).unwrap().phash)
    );
    assert_eq!(store(b"<html>", &never).unwrap_err().status, FetchStatus::NotImage);
    let half = &small[..small.len() / 2];
    assert_eq!(store(half, &never).unwrap_err().status, FetchStatus::Decode);
}

/// A smooth picture with detail, large enough to be scaled while it is decoded.
fn scenery(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let wave = |k: f64| ((f64::from(x) / k).sin() * (f64::from(y) / (k + 40.0)).cos() * 90.0 + 128.0) as u8;
        Rgb([wave(60.0), wave(140.0), wave(25.0) / 2 + (y * 100 / height) as u8])
    })
}

/// A JPEG by libjpeg-turbo.
fn turbo(image: &RgbImage, set: impl Fn(&mut turbojpeg::Compressor)) -> Vec<u8> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let mut encoder = turbojpeg::Compressor::new().unwrap();
    set(&mut encoder);
    let format = turbojpeg::PixelFormat::RGB;
    encoder.compress_to_vec(turbojpeg::Image { pixels: image.as_raw(), width, pitch: width * 3, height, format }).unwrap()
}

#[test]
fn scaling_while_decoding_changes_little() {
    let image = scenery(1601, 1199);
    let body = turbo(&image, |_| ());
    for size in [64, 150, 151, 700] {
        let stored = store(&body, &ImageConfig { size, ..config() }).unwrap();
        let (width, height) = (stored.width, stored.height);
        let full = resize::scale(image.as_raw(), (1601, 1199), (width, height), Interpolation::Lanczos).unwrap();
        let found = pixels(&stored);
        let off = found.as_raw().iter().zip(&full).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / full.len() as f64;
        assert!(off < 3.0, "{size}: {off} levels off on average");
        let apart = (stored.phash ^ phash::hash(&full, width, height)).count_ones();
        assert!(apart <= 2, "{size}: {apart} bits apart");
    }
}

#[test]
fn odd_jpegs_are_read() {
    let image = scenery(200, 120);
    let progressive = turbo(&image, |e| e.set_progressive(true).unwrap());
    let arithmetic = turbo(&image, |e| e.set_arithmetic(true).unwrap());
    let lossless = turbo(&image, |e| e.set_lossless(true).unwrap());
    let grey = turbo(&image, |e| e.set_subsamp(turbojpeg::Subsamp::Gray).unwrap());
    for (name, body) in [("progressive", &progressive), ("arithmetic", &arithmetic), ("lossless", &lossless), ("grey", &grey)] {
        let stored = store(body, &ImageConfig { size: 40, ..config() });
        assert_eq!(stored.map(|s| (s.width, s.height)), Ok((67, 40)), "{name}");
    }
    let p = pixels(&store(&grey, &config()).unwrap());
    assert!(p.pixels().all(|p| p[0] == p[1] && p[1] == p[2]));
    let plain = turbo(&image, |_| ());
    let original = pixels(&store(&plain, &config()).unwrap());
    let strays = [&plain[..2], b"\xff\xff\0stray", &plain[2..]].concat();
    let mut revision = plain.clone();
    revision[11] = 9; // the JFIF segment stands first
    for odd in [strays, revision] {
        assert_eq!(pixels(&store(&odd, &config()).unwrap()), original);
    }
    let archive = [plain.as_slice(), b"PK\x03\x04 and a <html> page"].concat();
    assert_eq!(pixels(&store(&archive, &config()).unwrap()), original, "a polyglot is its picture");
}

/// Where the data of the last scan begins, its header included.
fn last_scan(jpeg: &[u8]) -> usize {
    jpeg.windows(2).rposition(|w| w == [0xff, 0xda]).unwrap()
}

#[test]
fn damaged_and_hostile_jpegs_are_refused_harmless_oddities_are_not() {
    let body = turbo(&scenery(300, 200), |_| ());
    let end = body.len() - 2;
    let extra = [&body[..end], b"rubbish", &body[end..]].concat();
    assert!(store(&extra, &config()).is_ok(), "{:?}", store(&extra, &config()));
    // A part of the coded picture is gone, the end marker is there.
    let hole = [&body[..body.len() * 2 / 3], &body[end..]].concat();
    assert_eq!(refused(&hole), FetchStatus::Decode);

    let progressive = turbo(&scenery(300, 200), |e| e.set_progressive(true).unwrap());
    let scan = &progressive[last_scan(&progressive)..progressive.len() - 2];
    let bomb = [&progressive[..progressive.len() - 2], &scan.repeat(5_000), b"\xff\xd9"].concat();
    let refusal = store(&bomb, &config()).unwrap_err();
    assert_eq!(refusal.status, FetchStatus::Decode);
    assert!(refusal.reason.contains("more than 100 scans"), "{}", refusal.reason);

    let frame = body.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    let mut large = body.clone();
    large[frame + 5..frame + 9].copy_from_slice(&[0xff; 4]);
    assert_eq!(refused(&large), FetchStatus::TooManyPixels);
    // A small frame header before the real one must not lead past the guard.
    let length = 2 + usize::from(body[frame + 3]);
    let mut twice = [&body[..frame], &body[frame..frame + length], &large[frame..]].concat();
    assert_eq!(refused(&twice), FetchStatus::TooManyPixels);
    twice = [&large[..frame + length], &body[frame..]].concat();
    assert_eq!(refused(&twice), FetchStatus::Decode);
    let mut no_height = body;
    no_height[frame + 5..frame + 7].copy_from_slice(&[0; 2]);
    assert_eq!(refused(&no_height), FetchStatus::Decode);
}

/// A JPEG with a colour profile, in as many segments.
fn with_profile(image: &RgbImage, profile: &[u8], segments: usize) -> Vec<u8> {
    let body = turbo(image, |e| e.set_subsamp(turbojpeg::Subsamp::None).unwrap());
    let mut out = body[..2].to_vec();
    for (i, part) in profile.chunks(profile.len().div_ceil(segments)).enumerate() {
        out.extend([0xff, 0xe2]);
        out.extend(((part.len() + 16) as u16).to_be_bytes());
        out.extend(b"ICC_PROFILE\0");
        out.extend([i as u8 + 1, segments as u8]);
        out.extend(part);
    }
    out.extend(&body[2..]);
    out
}

#[test]
fn colour_profiles_are_heeded_and_broken_ones_are_not() {
    let image = RgbImage::from_pixel(64, 64, Rgb([200, 60, 60]));
    let colour = |body: &[u8]| *pixels(&store(body, &config()).unwrap()).get_pixel(30, 30);
    let wide = moxcms::ColorProfile::new_display_p3().encode().unwrap();
    // By the transfer function and matrices of both spaces, Display P3 (200, 60, 60) is sRGB (217, 42, 52).
    for segments in [1, 3] {
        let found = colour(&with_profile(&image, &wide, segments));
        assert!(is_near(found, [217, 42, 52], 3), "{found:?}");
    }
    let same = with_profile(&image, &moxcms::ColorProfile::new_srgb().encode().unwrap(), 1);
    assert!(is_near(colour(&same), [200, 60, 60], 2));
    let if_needed = ImageConfig { reencode: Reencode::IfNeeded, format: StoredFormat::Jpeg, ..ImageConfig::default() };
    assert_eq!(store(&same, &if_needed).unwrap().bytes, same);
    assert_ne!(store(&with_profile(&image, &wide, 1), &if_needed).unwrap().bytes, with_profile(&image, &wide, 1));
    for broken in [&wide[..wide.len() / 2], b"no profile at all", &[0xff; 4000]] {
        assert!(is_near(colour(&with_profile(&image, broken, 1)), [200, 60, 60], 3));
    }
    let mut body = Vec::new();
    let mut encoder = PngEncoder::new(&mut body);
    encoder.set_icc_profile(wide).unwrap();
    encoder.write_image(image.as_raw(), 64, 64, image::ExtendedColorType::Rgb8).unwrap();
    assert!(is_near(colour(&body), [217, 42, 52], 2));
}

/// A drawing of a few shapes on white, a different one for each number.
fn drawing(number: u32) -> RgbImage {
    let mix = |k: u32| (number * 7919 + k * 104_729).wrapping_mul(2_654_435_761) >> 8;
    RgbImage::from_fn(160, 120, |x, y| {
        for shape in 0..4 {
            let (cx, cy, r) = (mix(shape) % 160, mix(shape + 9) % 120, 10 + mix(shape + 18) % 40);
            if x.abs_diff(cx).pow(2) + y.abs_diff(cy).pow(2) < r * r {
                return Rgb([mix(shape + 27), mix(shape + 36), mix(shape + 45)].map(|c| c as u8));
            }
        }
        Rgb([255; 3])
    })
}

fn hash(image: &RgbImage) -> u64 {
    phash::hash(image.as_raw(), image.width(), image.height())
}

#[test]
fn copies_hash_alike_and_other_drawings_do_not() {
    let hashes: Vec<u64> = (0..60).map(|n| hash(&drawing(n))).collect();
    let mut apart = Vec::new();
    for (n, original) in (0..).zip(&hashes) {
        let image = drawing(n);
        let mut bad_jpeg = Vec::new();
        Encoder::new(&mut bad_jpeg, 40).encode(image.as_raw(), 160, 120, ColorType::Rgb).unwrap();
        let copy = image::load_from_memory(&bad_jpeg).unwrap().into_rgb8();
        let smaller = resize::scale(image.as_raw(), (160, 120), (80, 60), Interpolation::Lanczos).unwrap();
        apart.extend([hash(&copy), phash::hash(&smaller, 80, 60)].map(|copy| (copy ^ original).count_ones()));
    }
    let far = apart.iter().filter(|bits| **bits > 4).count();
    assert!(far <= apart.len() / 20 && apart.iter().all(|bits| *bits <= 10), "{far} of {} copies are far away", apart.len());
    let close = (0..60).flat_map(|i| (0..i).map(move |j| (i, j))).filter(|(i, j)| (hashes[*i] ^ hashes[*j]).count_ones() <= 4);
    assert_eq!(close.count(), 0);
}

#[test]
fn the_hash_knows_colour() {
    let flag = |a: [u8; 3], b: [u8; 3]| hash(&RgbImage::from_fn(90, 60, |x, _| Rgb(if x < 45 { a } else { b })));
    let one = flag([0, 120, 60], [200, 30, 30]);
    let other = flag([200, 100, 0], [0, 0, 254]);
    assert!((one ^ other).count_ones() > 8);
    assert_eq!(flag([9; 3], [9; 3]), flag([9; 3], [9; 3]));
}

#[test]
fn another_body_is_refused() {
    assert_eq!(verify(b"abc", HashKind::Md5, " 900150983CD24FB0D6963F7D28E17F72\n"), Ok(()));
    let refused = verify(b"abd", HashKind::Md5, "900150983cd24fb0d6963f7d28e17f72").unwrap_err();
    assert_eq!(refused.status, FetchStatus::HashMismatch);
    assert_eq!(refused.reason, "the body's md5 is 4911e516e5aa21d327512e0c8b197616");
}
