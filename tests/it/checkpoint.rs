//! Checkpoints under flipped bits, lost bytes, full disks and SIGKILL; output folders; signals.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use temper::checkpoint::{
    CheckpointWriter, Lock, checkpoint_path, free_bytes, is_saved, latest, list, prepare_output,
    prune, verify,
};
use temper::error::{Error, Result};
use temper::signals::Stop;
use temper::tensor::safetensors::{HostDtype, SafeFolder, TensorSpec};

/// A small generator of numbers below n.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

fn save(dir: &Path, step: u64, values: usize) -> Result<PathBuf> {
    let mut writer = CheckpointWriter::new(dir, step, 4 * values as u64)?;
    let spec =
        |name: &str| TensorSpec { name: name.into(), dtype: HostDtype::F32, shape: vec![values] };
    let bytes = |i: usize| vec![step as f32 + i as f32; values];
    writer.add_safetensors(
        "optimizer.safetensors",
        &[spec("m"), spec("v")],
        &[("step", "x")],
        &mut |i, t| t.dtype.encode(&bytes(i)),
    )?;
    writer.add_file("state.json", format!("{{\"step\": {step}}}").as_bytes())?;
    std::fs::write(writer.dir().join("model.bin"), step.to_le_bytes()).unwrap();
    writer.finish()
}

#[test]
fn a_checkpoint_reads_back_and_is_not_written_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), 3, 100).unwrap();
    assert_eq!(path, checkpoint_path(dir.path(), 3));
    let manifest = verify(&path).unwrap();
    assert_eq!(
        manifest.files.keys().collect::<Vec<_>>(),
        ["model.bin", "optimizer.safetensors", "state.json"]
    );
    assert_eq!(
        SafeFolder::open_file(path.join("optimizer.safetensors")).unwrap().names().count(),
        2
    );
    assert!(is_saved(dir.path(), 3) && !is_saved(dir.path(), 4));
    assert!(save(dir.path(), 3, 100).unwrap_err().to_string().contains("already saved"));
    std::fs::write(path.join("state.json"), "{}").unwrap();
    save(dir.path(), 3, 100).unwrap(); // a broken one is replaced
    assert!(is_saved(dir.path(), 3));
    let mut writer = CheckpointWriter::new(dir.path(), 4, 0).unwrap();
    for name in ["MANIFEST", "a/b", "..", "", "a\nb"] {
        assert!(writer.add_file(name, b"").is_err(), "{name:?}");
    }
    writer.add_file("a", b"").unwrap();
    assert!(writer.add_file("a", b"").is_err());
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn every_flipped_bit_and_every_lost_byte_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), 20, 500).unwrap();
    let files: Vec<PathBuf> =
        std::fs::read_dir(&path).unwrap().map(|f| f.unwrap().path()).collect();
    assert_eq!(files.len(), 4);
    let mut dice = Dice(7);
    for round in 0..2000 {
        let file = &files[dice.roll(files.len())];
        let good = std::fs::read(file).unwrap();
        let mut bad = good.clone();
        let bit = dice.roll(bad.len() * 8);
        bad[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(file, &bad).unwrap();
        assert!(verify(&path).is_err(), "round {round}: bit {bit} of {}", file.display());
        std::fs::write(file, &good).unwrap();
    }
    for file in &files {
        let good = std::fs::read(file).unwrap();
        let mut lengths: Vec<usize> = (0..250).map(|_| dice.roll(good.len())).collect();
        lengths.extend([0, good.len() - 1]);
        for length in lengths {
            std::fs::write(file, &good[..length]).unwrap();
            assert!(verify(&path).is_err(), "{} bytes of {}", length, file.display());
        }
        std::fs::write(file, [&good[..], b"\0"].concat()).unwrap();
        assert!(verify(&path).is_err(), "a byte more in {}", file.display());
        std::fs::remove_file(file).unwrap();
        assert!(verify(&path).is_err(), "{} missing", file.display());
        std::fs::write(file, &good).unwrap();
    }
    assert_eq!(verify(&path).unwrap().step, 20);
}

#[test]
fn a_broken_checkpoint_is_skipped_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    for step in [9, 10, 100, 101] {
        save(dir.path(), step, 10).unwrap();
    }
    let optimizer = dir.path().join("checkpoint-100/optimizer.safetensors");
    let mut bytes = std::fs::read(&optimizer).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&optimizer, bytes).unwrap();
    std::fs::remove_file(dir.path().join("checkpoint-101/MANIFEST")).unwrap();
    std::fs::rename(dir.path().join("checkpoint-9"), dir.path().join("checkpoint-99")).unwrap();
    std::fs::create_dir(dir.path().join("checkpoint-x")).unwrap();
    let search = latest(dir.path()).unwrap();
    assert_eq!(search.found.map(|f| f.step), Some(10));
    let reasons: Vec<&str> = search.skipped.iter().map(|(_, why)| why.as_str()).collect();
    assert_eq!(reasons.len(), 3);
    assert!(reasons[0].contains("no MANIFEST"), "{reasons:?}");
    assert!(reasons[1].contains("optimizer.safetensors is damaged"), "{reasons:?}");
    assert!(reasons[2].contains("step 9"), "{reasons:?}");
    let run = prepare_output(dir.path(), false, true).unwrap();
    assert_eq!(run.resume().unwrap().step, 10);
    assert!(run.notes()[0].contains("checkpoint-101"), "{:?}", run.notes());
}

#[test]
fn the_limit_keeps_the_newest_and_never_the_broken_instead() {
    let dir = tempfile::tempdir().unwrap();
    let steps = |dir: &Path| list(dir).unwrap().into_iter().map(|(n, _)| n).collect::<Vec<_>>();
    for step in [5, 10, 20, 30] {
        save(dir.path(), step, 1).unwrap();
    }
    std::fs::remove_file(dir.path().join("checkpoint-30/MANIFEST")).unwrap(); // a run resumed from 10 comes to 20
    assert!(prune(dir.path(), None, 20).unwrap().is_empty());
    prune(dir.path(), Some(2), 20).unwrap();
    assert_eq!(steps(dir.path()), [10, 20, 30]);
    prune(dir.path(), Some(1), 20).unwrap();
    assert_eq!(steps(dir.path()), [20, 30]);
    assert_eq!(latest(dir.path()).unwrap().found.unwrap().step, 20);
}

#[test]
fn an_output_folder_holds_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("deep/out");
    let run = prepare_output(&out, false, false).unwrap();
    let error = prepare_output(&out, true, false).unwrap_err().to_string();
    assert!(error.contains(&format!("(process {})", std::process::id())), "{error}");
    drop(run);
    std::fs::write(out.join("config.toml"), "a").unwrap();
    let error = prepare_output(&out, false, true).unwrap_err();
    assert!(
        error.to_string().contains("found only config.toml") && error.exit_code() == 2,
        "{error}"
    );
    save(&out, 1, 1).unwrap();
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    std::fs::create_dir(out.join("checkpoint-2.tmp")).unwrap();
    std::fs::create_dir(out.join("checkpoint-0.del")).unwrap();
    let error = prepare_output(&out, false, false).unwrap_err().to_string();
    assert!(error.contains("already holds a run (checkpoint-1, config.toml)"), "{error}");
    assert!(!out.join("checkpoint-2.tmp").exists() && !out.join("checkpoint-0.del").exists());
    assert!(prepare_output(&out, true, true).is_err());
    let run = prepare_output(&out, true, false).unwrap();
    assert!(
        run.resume().is_none() && list(&out).unwrap().is_empty() && out.join("notes.txt").exists()
    );
    drop(run);
    // The new run dies before it has saved anything: the old one is still there, and --resume says
    // where.
    let error = prepare_output(&out, false, true).unwrap_err().to_string();
    assert!(error.contains("holds no run") && error.contains(".overwritten-1.del"), "{error}");
    assert!(is_saved(out.join(".overwritten-1.del"), 1));
    let run = prepare_output(&out, true, false).unwrap();
    run.discard_overwritten().unwrap();
    assert!(!out.join(".overwritten-1.del").exists());
    // A model that temper did not train here is not touched.
    std::fs::write(out.join("model.safetensors"), "weights").unwrap();
    drop(run);
    assert!(
        prepare_output(&out, true, false).unwrap_err().to_string().contains("no run of temper")
    );
    assert!(prepare_output(dir.path().join("none"), false, true).is_err());
}

#[test]
fn too_little_space_is_an_error_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 1, 1).unwrap();
    let free = free_bytes(dir.path()).unwrap();
    assert!(free > 0);
    let error = CheckpointWriter::new(dir.path(), 2, free).unwrap_err();
    assert!(error.is_no_space() && error.to_string().contains("are free"), "{error}");
    assert!(!Error::Run(String::new()).is_no_space());
    assert_eq!(latest(dir.path()).unwrap().found.unwrap().step, 1);
}

/// Runs one test of this binary as a process of its own, with `TEMPER_CHILD` set to `dir`.
fn child(test: &str, dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("checkpoint::{test}"), "--nocapture", "--test-threads=1"]);
    command
        .env("TEMPER_CHILD", dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

/// The folder to work in, if this process is a child.
fn child_dir() -> Option<PathBuf> {
    std::env::var_os("TEMPER_CHILD").map(PathBuf::from)
}

fn wait_for(lines: &mut impl BufRead, word: &str) {
    let mut line = String::new();
    while !line.contains(word) {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "the child ended before it said {word}");
    }
}

#[test]
fn child_saves_until_it_is_killed() {
    let Some(dir) = child_dir() else { return };
    let run = prepare_output(&dir, false, list(&dir).is_ok_and(|l| !l.is_empty())).unwrap();
    let first = run.resume().map_or(0, |found| found.step);
    println!("ready");
    for step in first + 1.. {
        save(&dir, step, 4096).unwrap();
        std::fs::write(dir.join("reached.new"), step.to_string()).unwrap();
        std::fs::rename(dir.join("reached.new"), dir.join("reached")).unwrap();
        prune(&dir, Some(2), step).unwrap();
    }
}

#[test]
fn a_killed_run_always_leaves_its_newest_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(11);
    let (mut newest, mut in_a_save, mut in_a_deletion) = (0, 0, 0);
    for kill in 0..200 {
        let mut child = child("child_saves_until_it_is_killed", dir.path());
        wait_for(&mut BufReader::new(child.stdout.take().unwrap()), "ready");
        std::thread::sleep(Duration::from_micros(dice.roll(30_000) as u64));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        let names: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|f| f.unwrap().file_name().into_string().unwrap())
            .collect();
        in_a_save +=
            usize::from(names.iter().any(|n| n.starts_with("checkpoint-") && n.ends_with(".tmp")));
        in_a_deletion += usize::from(names.iter().any(|n| n.ends_with(".del")));
        let reached: u64 =
            std::fs::read_to_string(dir.path().join("reached")).map_or(0, |s| s.parse().unwrap());
        let search = latest(dir.path()).unwrap();
        assert!(search.skipped.is_empty(), "kill {kill}: {:?}", search.skipped);
        let step = search.found.map_or(0, |found| found.step);
        assert!(
            step >= newest && step >= reached,
            "kill {kill}: {step} after {newest}, {reached} was reached"
        );
        newest = step;
    }
    println!(
        "200 kills: {in_a_save} in a save, {in_a_deletion} in a deletion, newest step {newest}"
    );
    assert!(in_a_save >= 20 && newest >= 20, "{in_a_save} {newest}");
    prune(dir.path(), Some(2), newest).unwrap();
    assert_eq!(list(dir.path()).unwrap().len(), 2);
}

#[test]
fn child_saves_beyond_a_file_size_limit() {
    let Some(dir) = child_dir() else { return };
    // SAFETY: no other thread of this process writes files; a limit and an ignored signal are plain
    // settings.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let limit = libc::rlimit { rlim_cur: 64 << 10, rlim_max: 64 << 10 };
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
    let error = save(&dir, 2, 1 << 18).unwrap_err();
    assert!(error.is_no_space(), "{error}");
    save(&dir, 3, 100).unwrap(); // a smaller one still goes
    println!("refused: {error}");
}

#[test]
fn a_full_disk_leaves_the_old_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 1, 1 << 18).unwrap();
    let mut child = child("child_saves_beyond_a_file_size_limit", dir.path());
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    wait_for(&mut lines, "refused");
    std::io::copy(&mut lines, &mut std::io::sink()).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(is_saved(dir.path(), 1) && is_saved(dir.path(), 3));
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        2,
        "nothing is left of the failed save"
    );
}

#[test]
fn child_stops_on_a_signal() {
    let Some(_) = child_dir() else { return };
    let stop = Stop::on_signals().unwrap();
    println!("ready");
    while !stop.requested() {
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("stopping");
    std::thread::sleep(Duration::from_secs(60)); // a slow save: only a second signal ends it
}

#[test]
fn the_second_signal_ends_the_process_with_130() {
    let dir = tempfile::tempdir().unwrap();
    for (first, second) in [(libc::SIGINT, libc::SIGINT), (libc::SIGTERM, libc::SIGINT)] {
        let mut child = child("child_stops_on_a_signal", dir.path());
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let pid = libc::pid_t::try_from(child.id()).unwrap();
        wait_for(&mut lines, "ready");
        // SAFETY: kill takes plain numbers; the process is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, first) }, 0);
        wait_for(&mut lines, "stopping");
        // SAFETY: as above.
        assert_eq!(unsafe { libc::kill(pid, second) }, 0);
        assert_eq!(child.wait().unwrap().code(), Some(130));
    }
}

#[test]
fn a_lock_ends_with_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let lock = Lock::take(dir.path()).unwrap();
    assert!(lock.is_some() && Lock::take(dir.path()).is_err());
    drop(lock);
    assert!(Lock::take(dir.path()).unwrap().is_some());
}
