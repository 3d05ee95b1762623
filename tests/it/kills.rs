//! SIGKILL at random times of whole runs: each must end with the same bytes as an uninterrupted
//! run.
//!
//! A few kills run with every `cargo test`. To run all, 200 for each kind of run:
//! `TEMPER_KILLS=200 cargo test --test it kills -- --ignored --nocapture`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use temper::checkpoint::latest;

use crate::support::{MODEL, fixture, json_lines, write_rows};

const STEPS: usize = 4;

/// A kind of run: its name, its command, its rows, its own options.
type Kind = (&'static str, &'static str, &'static str, &'static [&'static str]);

const ADAPTER: [&str; 3] = ["use_peft=true", "lora_r=2", "lora_dropout=0.1"];
const PAIRS: &str = "tests/fixtures/preferences/plain.jsonl";
const TALKS: &str = "tests/fixtures/sft/messages.jsonl";
const PROMPTS: &str = "prompts";
const LETTERS: &str = "reward_funcs=regex:^[a-z ]";

const KINDS: &[Kind] = &[
    ("sft", "sft", TALKS, &[]),
    ("lora", "sft", TALKS, &ADAPTER),
    ("qlora", "sft", TALKS, &[ADAPTER[0], ADAPTER[1], ADAPTER[2], "load_in_4bit=true"]),
    ("dpo", "dpo", PAIRS, &["sync_ref_model=true", "ref_model_sync_steps=2"]),
    ("reward", "reward", PAIRS, &[]),
    ("kto", "kto", "tests/fixtures/preferences/unpaired.jsonl", &["loss_type=bco"]),
    (
        "grpo",
        "grpo",
        PROMPTS,
        &[LETTERS, "max_completion_length=6", "num_generations=2", "num_iterations=2"],
    ),
    (
        "ppo",
        "ppo",
        PROMPTS,
        &[LETTERS, "max_completion_length=6", "num_ppo_epochs=2", "num_mini_batches=1"],
    ),
    ("rloo", "rloo", PROMPTS, &[LETTERS, "max_completion_length=6", "num_generations=2"]),
    ("online-dpo", "online-dpo", PROMPTS, &[LETTERS, "max_new_tokens=6"]),
];

/// A small generator of numbers.
struct Dice(u64);

impl Dice {
    /// Uniform in [0, 1).
    fn roll(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// When a run is killed: by its own CPU time, so that a busy machine changes nothing.
#[derive(Clone, Copy)]
enum When {
    /// This long after its start.
    Started(Duration),
    /// This long after its last step is in the log: the last checkpoint and the model are written.
    Stepped(Duration),
    Never,
}

/// The CPU time of all threads of a process; none once it has ended.
fn cpu_time(pid: u32) -> Option<Duration> {
    let mut nanos = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        nanos += text.split(' ').next()?.parse::<u64>().ok()?;
    }
    Some(Duration::from_nanos(nanos))
}

/// Kills of one kind of run, by what the output folder held.
#[derive(Default)]
struct Tally {
    before: usize,
    between: usize,
    last: usize,
    runs: usize,
}

impl Tally {
    fn kills(&self) -> usize {
        self.before + self.between + self.last
    }
}

/// One kind of run, its uninterrupted output, and how long that took.
struct Subject {
    kind: &'static Kind,
    binary: PathBuf,
    rows: String,
    dir: tempfile::TempDir,
    whole: BTreeMap<PathBuf, Vec<u8>>,
    took: Duration,
    saved: Duration,
    tally: Tally,
}

impl Subject {
    fn new(kind: &'static Kind, binary: &Path) -> Subject {
        let dir = tempfile::tempdir().unwrap();
        let rows = match kind.2 {
            PROMPTS => {
                let rows = json_lines(fixture("sft/prompt_completion.jsonl"));
                let prompt = |row: &Value| json!({ "prompt": row["prompt"] });
                let rows: Vec<Value> = rows.iter().take(16).map(prompt).collect();
                write_rows(dir.path().join("prompts.jsonl"), &rows)
            }
            file => file.to_string(),
        };
        let mut subject = Subject {
            kind,
            binary: binary.into(),
            rows,
            dir,
            whole: BTreeMap::new(),
            took: Duration::ZERO,
            saved: Duration::ZERO,
            tally: Tally::default(),
        };
        let out = subject.dir.path().join("whole");
        subject.go(&out, When::Never);
        subject.whole = contents(&out);
        subject
    }

    fn start(&self, out: &Path) -> Child {
        let (_, command, _, options) = self.kind;
        let mut run = Command::new(&self.binary);
        run.args([command, "--model", MODEL, "--data", &self.rows, "--output"]).arg(out);
        run.args(*options).arg(format!("max_steps={STEPS}"));
        run.args(["save_steps=1", "save_total_limit=2", "logging_steps=1", "device=cpu"]);
        run.args(["per_device_train_batch_size=2", "learning_rate=1e-3"]);
        if latest(out).is_ok_and(|search| search.found.is_some()) {
            run.arg("--resume");
        } else if out.exists() {
            run.arg("--overwrite"); // it was killed before there was anything to go on from
        }
        // One thread: many runs share the machine.
        run.env("RAYON_NUM_THREADS", "1");
        run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Whether the log has the last step.
    fn stepped(out: &Path) -> bool {
        let log = std::fs::read(out.join("metrics.jsonl")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        log.lines().last().is_some_and(|line| line.contains(&format!("\"step\":{STEPS},")))
    }

    /// Starts or resumes the run; false: it was killed.
    fn go(&mut self, out: &Path, when: When) -> bool {
        let mut run = self.start(out);
        self.tally.runs += 1;
        let (mut used, mut stepped) = (Duration::ZERO, None);
        loop {
            if let Some(status) = run.try_wait().unwrap() {
                let said = std::io::read_to_string(run.stderr.take().unwrap()).unwrap();
                assert_eq!(status.code(), Some(0), "{}: {said}", self.kind.0);
                if self.whole.is_empty() {
                    self.took = used;
                    self.saved = stepped.map_or(self.saved, |s: Duration| used - s);
                }
                return true;
            }
            used = used.max(cpu_time(run.id()).unwrap_or(used));
            if stepped.is_none() && Self::stepped(out) {
                stepped = Some(used);
            }
            let due = match when {
                When::Started(after) => used >= after,
                When::Stepped(after) => stepped.is_some_and(|s| used - s >= after),
                When::Never => false,
            };
            if due {
                run.kill().unwrap(); // SIGKILL
                if run.wait().unwrap().code().is_some() {
                    continue; // it had ended by itself: not a kill
                }
                let found = latest(out).is_ok_and(|search| search.found.is_some());
                match (stepped.is_some(), found) {
                    (true, _) => self.tally.last += 1,
                    (false, true) => self.tally.between += 1,
                    (false, false) => self.tally.before += 1,
                }
                return false;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// A run that is killed up to `most` times, then ends: its output must be the whole run's.
    fn chain(&mut self, dice: &mut Dice, most: usize) {
        let out = self.dir.path().join("killed");
        let mut kills = 0;
        loop {
            let when = match (kills < most, dice.roll() < 0.4) {
                (false, _) => When::Never,
                (true, true) => When::Stepped(self.saved.mul_f64(dice.roll())),
                (true, false) => When::Started(self.took.mul_f64(1.05 * dice.roll())),
            };
            if self.go(&out, when) {
                break;
            }
            kills += 1;
        }
        let name = self.kind.0;
        let ended = contents(&out);
        let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&ended), names(&self.whole), "{name} after {kills} kills");
        for (path, bytes) in &self.whole {
            assert!(ended[path] == *bytes, "{name}: {} after {kills} kills", path.display());
        }
        std::fs::remove_dir_all(out).unwrap();
    }
}

/// Every file of an output folder but the lock and the page, without the times in it.
fn contents(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![out.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            match name.as_str() {
                _ if path.is_dir() => folders.push(path),
                // A manifest is made of the sizes and digests of files that hold times.
                ".lock" | "report.html" | "report.json" | "MANIFEST" => {}
                _ => {
                    let bytes = std::fs::read(&path).unwrap();
                    let bytes = if name.ends_with("json") || name.ends_with("jsonl") {
                        timeless(&String::from_utf8(bytes).unwrap(), &name)
                    } else {
                        bytes
                    };
                    files.insert(path.strip_prefix(out).unwrap().to_path_buf(), bytes);
                }
            }
        }
    }
    files
}

/// JSON without what depends on time: rates, peaks, the date of the start.
fn timeless(text: &str, name: &str) -> Vec<u8> {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                let timed = |key: &str| {
                    key.starts_with("time/")
                        || ["tokens_per_second", "peak_memory", "started"].contains(&key)
                };
                map.retain(|key, _| !timed(key));
                map.values_mut().for_each(strip);
            }
            Value::Array(list) => list.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let read = |text: &str| {
        let mut value: Value =
            serde_json::from_str(text).unwrap_or_else(|e| panic!("{name}: {e}: {text}"));
        strip(&mut value);
        format!("{value}\n").into_bytes()
    };
    match name.ends_with("jsonl") {
        true => text.lines().flat_map(read).collect(),
        false => read(text),
    }
}

/// A copy of the binary, so that a build meanwhile changes nothing. Not beside other tests: a child
/// that one of them starts while the copy is written keeps it from being run.
fn binary(dir: &Path) -> PathBuf {
    let copy = dir.join("temper");
    std::fs::copy(env!("CARGO_BIN_EXE_temper"), &copy).unwrap();
    copy
}

#[test]
fn a_run_of_each_kind_survives_a_few_kills() {
    let binary = Path::new(env!("CARGO_BIN_EXE_temper"));
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut kills = 0;
    for kind in KINDS {
        let mut subject = Subject::new(kind, binary);
        subject.chain(&mut dice, 2);
        kills += subject.tally.kills();
    }
    assert!(kills > KINDS.len() / 2, "only {kills} runs were still there to be killed");
}

#[test]
#[ignore = "minutes: TEMPER_KILLS kills of each kind of run, 200 if it is not set"]
fn kills_at_random_times_lose_nothing() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let wanted = number("TEMPER_KILLS").unwrap_or(200) as usize;
    let dir = tempfile::tempdir().unwrap();
    let binary = binary(dir.path());
    let mut dice = Dice(number("TEMPER_SEED").unwrap_or(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut subjects: Vec<Subject> = KINDS.iter().map(|k| Subject::new(k, &binary)).collect();
    while subjects.iter().any(|s| s.tally.kills() < wanted) {
        for subject in subjects.iter_mut().filter(|s| s.tally.kills() < wanted) {
            let most = 1 + (3.0 * dice.roll()) as usize;
            subject.chain(&mut dice, most.min(wanted - subject.tally.kills()));
        }
        let counts = subjects.iter().map(|s| {
            let Tally { before, between, last, runs } = s.tally;
            format!("{} {} ({before}+{between}+{last}) in {runs}", s.kind.0, s.tally.kills())
        });
        println!("{}", counts.collect::<Vec<_>>().join(", "));
    }
}
