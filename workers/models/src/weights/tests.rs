//! Weight files made to do harm, and the odd ones that torch writes.

#![allow(clippy::unwrap_used)]

use std::io::{Cursor, Write};

use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::pickle::Pickle;
use super::*;

/// What opening a file fails with, at length.
fn failure(name: &str, bytes: &[u8]) -> String {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join(name), bytes).unwrap();
    match Weights::open(folder.path()).unwrap_err() {
        ModelError::Weights { what, source, .. } => format!("{what}: {source:?}"),
        other => panic!("{other}"),
    }
}

fn safetensors(header: &str, numbers: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + numbers, 0);
    bytes
}

/// An archive of these files, as `torch.save` lays it out.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in files {
        zip.start_file(format!("archive/{name}"), options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// `{"a": tensor}`, where the tensor is a view of the storage `0` of `FloatStorage`, by opcodes.
fn pickled(offset: u32, shape: &[u32], stride: &[u32]) -> Vec<u8> {
    let int = |n: &u32| [b"J".as_slice(), &n.to_le_bytes()].concat();
    let tuple = |items: &[u32]| [b"(".to_vec(), items.iter().flat_map(int).collect(), b"t".to_vec()].concat();
    let text = |text: &str| [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    [
        b"\x80\x02}".to_vec(),
        text("a"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        b"K\x04tQ".to_vec(),
        int(&offset),
        tuple(shape),
        tuple(stride),
        b"\x89NtRs.".to_vec(),
    ]
    .concat()
}

fn torch_file(pickle: &[u8], numbers: &[u8]) -> Vec<u8> {
    archive(&[("data.pkl", pickle), ("byteorder", b"little"), ("data/0", numbers)])
}

/// A file of `torch.save` before version 1.6, with one storage that says to have `count` numbers.
fn old_torch_file(pickle: &[u8], count: u64, numbers: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let (version, system, order) = (b"\x80\x02M\xe9\x03.", b"\x80\x02}.", b"\x80\x02]X\x01\x00\x00\x000a.");
    [magic.as_slice(), version, system, pickle, order, &count.to_le_bytes(), numbers].concat()
}

#[test]
fn files_without_an_archive_are_read_and_held_to_their_length() {
    let pickle = pickled(1, &[2], &[1]);
    let numbers: Vec<u8> = [1.0_f32, 2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("old.pth"), old_torch_file(&pickle, 3, &numbers)).unwrap();
    let read = Weights::open(folder.path()).unwrap().read("a", &Device::Cpu).unwrap();
    assert_eq!(read.to_vec1::<f32>().unwrap(), [2.0, 3.0]);
    let whole = old_torch_file(&pickle, 3, &numbers);
    for (bytes, part) in [
        (old_torch_file(&pickle, 4, &numbers), "cut off"),
        (old_torch_file(&pickle, u64::MAX, &numbers), "cut off"),
        (old_torch_file(&pickle, u64::MAX / 4, &numbers), "cut off"),
        (old_torch_file(&pickled(2, &[2], &[1]), 3, &numbers), "reaches beyond its numbers"),
        (whole[..whole.len() - 20].to_vec(), "fill whole buffer|UnexpectedEof"),
        (whole[..40].to_vec(), "an end in the middle|without an end"),
    ] {
        let text = failure("old.pth", &bytes);
        assert!(part.split('|').any(|part| text.contains(part)), "{text}");
    }
}

#[test]
fn headers_that_lie_are_refused_before_memory_is_taken() {
    let entry = |shape: &str, end: &str| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
    for (bytes, part) in [
        (u64::MAX.to_le_bytes().to_vec(), "a header of 18446744073709551615 bytes"),
        (1_000_u64.to_le_bytes().to_vec(), "a header of 1000 bytes in a file of 8"),
        (safetensors(&entry("[1000000,1000000]", "4000000000000"), 0), "4000000000000 bytes of numbers, it has 0"),
        (safetensors(&entry("[4294967296,4294967296,4]", "16"), 16), "no_tensor|overflow|ValidationOverflow"),
        (safetensors(&entry("[2]", "16"), 16), "no_tensor|TensorInvalidInfo|invalid"),
        (safetensors(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8), "offset"),
        (safetensors(r#"{"a":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}"#, 4), "X99"),
        (safetensors("{}", 4), "0 bytes of numbers, it has 4"),
        (safetensors(&"[".repeat(100_000), 0), "recursion|invalid"),
    ] {
        let text = failure("model.safetensors", &bytes);
        assert!(text.contains("not a readable safetensors file"), "{text}");
        assert!(part.split('|').any(|part| text.contains(part)), "{text}");
    }
}

#[test]
fn empty_tensors_of_any_size_are_nothing() {
    let folder = TempDir::new().unwrap();
    let header = r#"{"a":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}"#;
    std::fs::write(folder.path().join("model.safetensors"), safetensors(header, 0)).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.bytes(weights.get("a").unwrap()).unwrap(), [0; 0]);
    weights.write(&folder.path().join("copy.safetensors")).unwrap();
}

#[test]
fn a_tensor_is_a_view_of_its_storage() {
    let numbers: Vec<u8> = (0..6_u8).flat_map(|n| f32::from(n).to_le_bytes()).collect();
    let read = |offset, shape: &[u32], stride: &[u32]| {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("a.pth"), torch_file(&pickled(offset, shape, stride), &numbers)).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        weights.read("a", &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(read(0, &[2, 3], &[3, 1]), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(read(0, &[3, 2], &[1, 3]), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert_eq!(read(4, &[2], &[1]), [4.0, 5.0]);
    assert_eq!(read(1, &[2, 1, 2], &[3, 99, 1]), [1.0, 2.0, 4.0, 5.0]);
    assert_eq!(read(5, &[], &[]), [5.0]);
}

#[test]
fn tensors_beyond_their_storage_are_refused() {
    let numbers = [0; 24];
    for (offset, shape, stride) in [
        (0, vec![7], vec![1]),
        (5, vec![2], vec![1]),
        (7, vec![], vec![]),
        (0, vec![2, 2], vec![5, 2]),
        (0, vec![0x7fff_ffff; 8], vec![0x7fff_ffff; 8]),
        // A thousand million times the same number.
        (0, vec![1_000_000_000], vec![0]),
    ] {
        let text = failure("a.pth", &torch_file(&pickled(offset, &shape, &stride), &numbers));
        assert!(text.contains("the tensor a reaches beyond its numbers"), "{text}");
    }
    assert!(failure("a.pth", &torch_file(&pickled(0, &[2; 9], &[0; 9]), &numbers)).contains("a tensor of 9 dimensions"));
    assert!(failure("a.pth", &torch_file(&pickled(0, &[2], &[1, 1]), &numbers)).contains("other steps than dimensions"));
}

#[test]
fn archives_that_are_not_torch_s_are_told() {
    let good = pickled(0, &[1], &[1]);
    let with_torch_script = archive(&[("data.pkl", &good), ("constants.pkl", b""), ("data/0", &[0; 4])]);
    for (bytes, part) in [
        (b"\x80\x02\x8a\x0a".to_vec(), "was not written by torch.save"),
        ([vec![b'm'; 257], b"ustar".to_vec()].concat(), "before version 0.1.10"),
        (b"GGUF".to_vec(), "not written by torch.save"),
        (Vec::new(), "not written by torch.save"),
        (b"PK\x03\x04rubbish".to_vec(), "no whole archive"),
        (archive(&[("data/0", &[0; 4])]), "does not hold one `data.pkl`"),
        (archive(&[("data.pkl", &good), ("more/data.pkl", &good)]), "does not hold one `data.pkl`"),
        (with_torch_script, "TorchScript"),
        (archive(&[("data.pkl", &good), ("byteorder", b"big"), ("data/0", &[0; 4])]), "not little-endian"),
        (archive(&[("data.pkl", &good)]), "the numbers of the tensor a are missing"),
        (torch_file(b"\x80\x02K\x01.", &[]), "no dictionary of tensors"),
        (torch_file(b"\x80\x02}.", &[]), "no dictionary of tensors"),
        (torch_file(&vec![b'N'; 5 << 20], &[]), "a pickle of more than 4 MiB"),
    ] {
        let text = failure("a.pth", &bytes);
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_compressed_archive_is_refused() {
    // Made by Python's zipfile with deflate: `x/data.pkl` of ten million times `N`, in ten kilobytes.
    let mut bytes = archive(&[("data.pkl", &[b'N'; 64])]);
    for at in 0..bytes.len() - 10 {
        // The method, in the local header and in the directory.
        if bytes[at..].starts_with(b"PK\x03\x04") {
            bytes[at + 8] = 8;
        } else if bytes[at..].starts_with(b"PK\x01\x02") {
            bytes[at + 10] = 8;
        }
    }
    let text = failure("a.pth", &bytes);
    assert!(text.contains("no whole archive of torch.save"), "{text}");
}

#[test]
fn a_pickle_runs_no_code() {
    let marker = std::env::temp_dir().join("capfilt-a-pickle-ran-code");
    let command = format!("touch {}", marker.display());
    // os.system(command), as a pickle that harms would call it; then, in another, as an item of a dictionary.
    let call =
        [b"\x80\x02cposix\nsystem\nX".as_slice(), &(command.len() as u32).to_le_bytes(), command.as_bytes(), b"\x85R."].concat();
    assert!(failure("a.pth", &torch_file(&call, &[])).contains("no dictionary of tensors"));
    let item = [b"\x80\x02}X\x01\x00\x00\x00a".as_slice(), &call[2..call.len() - 1], b"s."].concat();
    assert!(failure("a.pth", &torch_file(&item, &[])).contains("no dictionary of tensors"));
    assert!(!marker.exists());
}

#[test]
fn pickles_that_grow_cost_no_more_than_their_length() {
    let started = std::time::Instant::now();
    // Each tuple names the one before twice: 2^50000 values if they were copied.
    let mut laughs = b"\x80\x02}q\x00".to_vec();
    (0..50_000).for_each(|_| laughs.extend_from_slice(b"h\x00h\x00\x86q\x00"));
    laughs.push(b'.');
    assert!(Pickle::read(&laughs).unwrap().state_dict().is_err());
    // A million tuples in each other; a reader that goes down into them runs out of stack.
    let nested = [b"\x80\x02)".to_vec(), vec![0x85; 1 << 20], b".".to_vec()].concat();
    assert!(Pickle::read(&nested).unwrap().state_dict().is_err());
    // A function of a million arguments, called a hundred thousand times.
    let mut calls = [b"\x80\x02(".to_vec(), vec![b'N'; 1 << 20], b"tq\x00ca\nb\nq\x01".to_vec()].concat();
    (0..100_000).for_each(|_| calls.extend_from_slice(b"h\x01h\x00R0"));
    calls.extend_from_slice(b"}.");
    assert!(Pickle::read(&calls).unwrap().state_dict().is_err());
    // A value that holds itself.
    assert!(Pickle::read(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.").unwrap().state_dict().is_err());
    assert!(started.elapsed().as_secs() < 10);
}

#[test]
fn broken_pickles_are_told_where() {
    for (pickle, part) in [
        (b"\x80".as_slice(), "an end in the middle of a value at byte 0"),
        (b"\x80\x02", "an end in the middle of a value at byte 2"),
        (b"\x80\x02X\xff\xff\xff\xffa", "an end in the middle"),
        (b"\x80\x02cos", "a name without an end"),
        (b"\x80\x02t", "no mark"),
        (b"\x80\x02N(0t", "above the stack"),
        (b"\x80\x02\x87", "an empty stack"),
        (b"\x80\x02h\x07", "no value 7"),
        (b"\x80\x02q\x07", "an empty stack"),
        (b"\x80\x02iposix\nsystem\n", "opcode 0x69, which torch.save does not write"),
        (b"\x80\x02R", "an empty stack"),
        (b"\x80\x02\x8a\xff", "an end in the middle"),
    ] {
        let error = Pickle::read(pickle).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    assert!(Pickle::read(b"\x80\x02\x8a\x08\xff\xff\xff\xff\xff\xff\xff\xff0}.").is_ok());
}

#[test]
fn two_tensors_do_not_get_one_name() {
    let folder = TempDir::new().unwrap();
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    std::fs::write(folder.path().join("model.safetensors"), safetensors(header, 2)).unwrap();
    let open = || Weights::open(folder.path()).unwrap();
    let error = open().rename(|_| Some("c".to_owned())).unwrap_err().to_string();
    assert!(error.contains("has two tensors for c: a and b"), "{error}");
    let weights = open().rename(|name| (name == "b").then(|| "c".to_owned())).unwrap();
    assert_eq!(weights.bytes(weights.get("c").unwrap()).unwrap(), [0]);
    assert_eq!(weights.tensors().count(), 1);
}
