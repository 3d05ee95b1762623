use super::*;
use crate::fsio::Written;

fn spec(name: &str, dtype: HostDtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
}

fn sample(path: &Path) -> Written {
    let tensors = [
        spec("b", HostDtype::BF16, &[3]),
        spec("a", HostDtype::F32, &[2, 2]),
        spec("h", HostDtype::F16, &[2]),
        spec("empty", HostDtype::F32, &[0, 4]),
    ];
    let values: [&[f32]; 4] =
        [&[1.0, -2.5, 3.0], &[0.5, 1.5, -0.25, 1e-30], &[0.125, 65504.0], &[]];
    write(path, &tensors, &[("format", "pt")], &mut |i, t| t.dtype.encode(values[i])).unwrap()
}

fn read_f32(folder: &SafeFolder, name: &str) -> Vec<f32> {
    let view = folder.get(name).unwrap();
    let mut out = vec![0.0; view.len()];
    view.to_f32_into(&mut out).unwrap();
    out
}

fn error_of(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    SafeFolder::open(dir.path()).unwrap_err().to_string()
}

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn folder_of(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

#[test]
fn what_is_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let written = sample(&path);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(written, Written { bytes: bytes.len() as u64, crc32: crc32fast::hash(&bytes) });
    let folder = SafeFolder::open(dir.path()).unwrap();
    assert_eq!(folder.names().collect::<Vec<_>>(), ["a", "b", "empty", "h"]);
    assert_eq!(read_f32(&folder, "a"), [0.5, 1.5, -0.25, 1e-30]);
    assert_eq!(read_f32(&folder, "b"), [1.0, -2.5, 3.0]);
    assert_eq!(read_f32(&folder, "h"), [0.125, 65504.0]);
    assert!(folder.get("empty").unwrap().is_empty() && folder.get("c").is_none());
    assert_eq!(folder.get("a").unwrap().shape, [2, 2]);
    assert_eq!(folder.metadata().get("format").map(String::as_str), Some("pt"));
    let names: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names, ["model.safetensors"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777 | 0o022, 0o666);
    }
}

#[test]
fn the_safetensors_crate_reads_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    sample(&path);
    let bytes = std::fs::read(&path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(
        read.tensor("a").unwrap().data(),
        HostDtype::F32.encode(&[0.5, 1.5, -0.25, 1e-30]).unwrap()
    );
    assert_eq!(read.len(), 4);
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    sample(&path);
    let before = std::fs::read(&path).unwrap();
    let tensors = [spec("a", HostDtype::F32, &[2])];
    let error = write(&path, &tensors, &[], &mut |_, _| Ok(vec![0; 4])).unwrap_err().to_string();
    assert!(error.contains("a: 4 bytes were given, its shape needs 8"), "{error}");
    let twice = [tensors[0].clone(), tensors[0].clone()];
    assert!(write(&path, &twice, &[], &mut |_, _| Ok(vec![0; 8])).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn misaligned_values_are_read() {
    for pad in 0..8 {
        let header = format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}{}"#,
            " ".repeat(pad)
        );
        let dir = folder_of(&[(
            "model.safetensors",
            &file(&header, &HostDtype::F32.encode(&[1.5, -3.0]).unwrap()),
        )]);
        assert_eq!(read_f32(&SafeFolder::open(dir.path()).unwrap(), "a"), [1.5, -3.0]);
    }
}

#[test]
fn conversions_agree_with_half_for_every_pattern() {
    let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in [HostDtype::F16, HostDtype::BF16] {
        let view =
            TensorView { name: "x", dtype, shape: &[65536], bytes: &bits, path: Path::new("x") };
        let mut out = vec![0.0; 65536];
        view.to_f32_into(&mut out).unwrap();
        for (i, got) in out.iter().enumerate() {
            let want = if dtype == HostDtype::F16 {
                f16::from_bits(i as u16).to_f32()
            } else {
                bf16::from_bits(i as u16).to_f32()
            };
            assert!(
                *got == want || got.is_nan() && want.is_nan(),
                "{dtype:?} {i:#x}: {got} {want}"
            );
        }
        let first = out.iter().position(|v| !v.is_finite());
        assert_eq!(view.first_non_finite(), first);
    }
}

#[test]
fn the_first_non_finite_value_is_found_anywhere() {
    for at in [0, 1, 4095, 4096, 9999] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![f32::MAX; 10_000];
            values[at] = bad;
            values[9_999] = bad;
            assert_eq!(
                first_non_finite(HostDtype::F32, &HostDtype::F32.encode(&values).unwrap()),
                Some(at)
            );
        }
    }
}

#[test]
fn a_reader_of_another_size_or_dtype_is_told() {
    let dir = tempfile::tempdir().unwrap();
    sample(&dir.path().join("model.safetensors"));
    let folder = SafeFolder::open(dir.path()).unwrap();
    let error = folder.get("a").unwrap().to_f32_into(&mut [0.0; 3]).unwrap_err().to_string();
    assert!(error.contains("a has 4 values, but 3 are needed"), "{error}");
    let header = r#"{"i":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#;
    let dir = folder_of(&[("model.safetensors", &file(header, &[0; 4]))]);
    let error = SafeFolder::open(dir.path())
        .unwrap()
        .get("i")
        .unwrap()
        .to_f32_into(&mut [0.0])
        .unwrap_err();
    assert!(error.to_string().contains("i is stored as I32"), "{error}");
}

#[test]
fn broken_files_say_what_is_wrong() {
    let good = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let cases: [(Vec<u8>, &str); 9] = [
        (vec![], "truncated: 0 bytes"),
        (vec![1, 2, 3], "truncated: 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid".to_vec(), "Git LFS pointer"),
        (file(good, &[0; 8])[..30].to_vec(), "its header should have 54 bytes, but 22 follow"),
        (file(good, &[0; 5]), "promises 8 bytes of values, but the file has 5"),
        (file(good, &[0; 9]), "does not describe the file"),
        (file(&good.replace("[2]", "[3]"), &[0; 8]), "does not describe the file"),
        (file(&good.replace("F32", "F31"), &[0; 8]), "does not describe the file"),
        (file("{\"a\":", &[]), "does not describe the file"),
    ];
    for (bytes, expected) in cases {
        let error = error_of(&bytes);
        assert!(
            error.contains("model.safetensors: ") && error.contains(expected),
            "{expected}: {error}"
        );
    }
}

#[test]
fn a_folder_without_weights_says_what_was_looked_for() {
    let dir = folder_of(&[("pytorch_model.bin", b"x")]);
    let error = SafeFolder::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("looked for model.safetensors and model.safetensors.index.json"),
        "{error}"
    );
    assert!(error.contains("save_pretrained()"), "{error}");
    assert!(
        SafeFolder::open(dir.path().join("missing"))
            .unwrap_err()
            .to_string()
            .contains("is not a folder")
    );
}

#[test]
fn an_index_is_held_to_its_word() {
    let one = file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    let index = |map: &str| format!(r#"{{"weight_map":{map}}}"#).into_bytes();
    let name = "model.safetensors.index.json";
    let cases = [
        (index(r#"{"a":"x.safetensors","b":"gone.safetensors"}"#), "gone.safetensors: is named in"),
        (index(r#"{"a":"x.safetensors","b":"x.safetensors"}"#), "b in x.safetensors"),
        (index(r#"{"a":"x.safetensors","c":"y.safetensors"}"#), "also holds: a"),
        (index(r#"{"a":"../x.safetensors"}"#), "a plain file name"),
        (index("{}"), "empty weight_map"),
        (b"[1]".to_vec(), "is not an index"),
    ];
    for (index, expected) in cases {
        let dir = folder_of(&[("x.safetensors", &one), ("y.safetensors", &one), (name, &index)]);
        let error = SafeFolder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn no_mutation_of_a_file_makes_the_reader_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    sample(&path);
    let good = std::fs::read(&path).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % n.max(1)
    };
    let mut accepted = 0;
    for round in 0..20_000 {
        let path = dir.path().join(round.to_string()); // a new path: ext4 syncs a truncated file
        let mut bytes = good.clone();
        for _ in 0..1 + next(3) {
            let at = next(bytes.len());
            match next(6) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, next(256) as u8),
                2 if !bytes.is_empty() => drop(bytes.remove(at)),
                3 => bytes.extend_from_within(at..),
                4 if at < bytes.len() => bytes[at] ^= 1 << next(8),
                _ if at < bytes.len() => bytes[at] = b"0123456789[]{}\",:FB"[next(19)],
                _ => {}
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(folder) = SafeFolder::open_file(&path) {
            accepted += 1;
            for name in folder.names() {
                let view = folder.get(name).unwrap();
                view.first_non_finite();
                if let Some(size) = view.dtype.size() {
                    assert_eq!(view.bytes.len(), view.len() * size);
                    view.to_f32_into(&mut vec![0.0; view.len()]).unwrap();
                }
            }
        }
        std::fs::remove_file(&path).unwrap();
    }
    assert!(accepted < 19_000, "the mutator does not mutate: {accepted} accepted");
}
