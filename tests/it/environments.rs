//! Completions of several turns with an environment: end to end with each method, and with programs
//! that crash, hang, flood, exit, or answer differently after a restart.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use temper::checkpoint::prepare_output;
use temper::data::rows::read_rows;
use temper::device::DType;
use temper::error::Result;
use temper::methods::online::grpo::GrpoConfig;
use temper::methods::online::online_dpo::OnlineDpoConfig;
use temper::methods::online::ppo::PpoConfig;
use temper::methods::online::reinforce::ReinforceConfig;
use temper::methods::online::rloo::RlooConfig;
use temper::methods::{BuildMethod, MethodRun};
use temper::observer::Silent;
use temper::rewards::{Environment, EnvironmentAnswer, EnvironmentTurn, RewardFunction};
use temper::signals::Stop;
use temper::train::job::{Job, JobRows, execute};
use temper::train::rows::RunRows;

use crate::support::{MODEL, cpu_in, fixture, json_lines, metrics};

/// The loop of an environment in a shell: `$line` is the request, `$id` its id; `step` answers a
/// turn.
fn shell(step: &str) -> String {
    format!(
        "while read -r line; do id=${{line#*:}}; id=${{id%%,*}}; case $line in \
         *'\"op\":\"reset\"'*) echo \"{{\\\"id\\\": $id}}\";; *) {step};; esac; done"
    )
}

/// Answers a turn with what `body` says behind the id.
fn say(body: &str) -> String {
    format!("echo \"{{\\\"id\\\": $id, {}}}\"", body.replace('"', "\\\""))
}

/// Three turns; each is worth 1 if its text ends with a letter of the first half.
fn letters(before: &str) -> String {
    shell(&letters_step(before))
}

fn letters_step(before: &str) -> String {
    let good = say(r#""reward": 1, "observation": "8""#);
    let end = say(r#""reward": 0, "done": true"#);
    let other = say(r#""reward": 0, "observation": [{"role": "tool", "content": "no"}]"#);
    format!(
        "{before} case $line in *'\"turn\":3,'*) {end};; *[a-m]'\",\"completion_ids\"'*) {good};; *) {other};; esac"
    )
}

/// The fixture's model with more end tokens, so that turns end: the printable ASCII characters.
fn model(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(MODEL).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let ends: Vec<u32> = (2..=96).collect();
    let config = json!({ "eos_token_id": ends }).to_string();
    std::fs::write(model.join("generation_config.json"), config).unwrap();
    model
}

struct Setup {
    dir: tempfile::TempDir,
    model: PathBuf,
    environment: String,
    rewards: Vec<RewardFunction>,
}

impl Setup {
    fn new(environment: &str) -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let (model, environment) = (model(dir.path()), environment.to_string());
        Setup { dir, model, environment, rewards: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a method into `out`; with `resume`, continues the run in that folder.
    fn go<M: BuildMethod + Default + 'static>(
        &self,
        out: &str,
        keys: &[&str],
        resume: bool,
        dtype: DType,
    ) -> Result<Vec<Value>> {
        let script = self.path("environment.sh");
        std::fs::write(&script, &self.environment).unwrap();
        let environment = format!("environment=sh {}", script.display());
        let common = [
            environment.as_str(),
            "per_device_train_batch_size=4",
            "gradient_accumulation_steps=2",
            "learning_rate=1e-3",
            "logging_steps=1",
            "max_steps=4",
            "save_steps=2",
            "max_completion_length=80",
        ];
        let keys: Vec<String> = common.iter().chain(keys).map(|k| k.to_string()).collect();
        let (run, _) = MethodRun::<M>::load(None, &keys)?;
        let rows = read_rows(&[fixture("sft/chat_prompt_completion.jsonl")])?;
        let out = self.path(out);
        let folder = prepare_output(&out, false, resume)?;
        let job = Job {
            run: &run,
            model: &self.model,
            adapter: None,
            fresh: false,
            rows: JobRows::Given(&RunRows { train: rows, ..Default::default() }),
            rewards: &self.rewards,
            folder: &folder,
            command: "test",
            stop: Stop::default(),
        };
        execute(cpu_in(dtype), &job)?;
        drop(folder);
        Ok(metrics(&out))
    }

    fn completions(&self, out: &str) -> Vec<Value> {
        json_lines(self.path(out).join("completions.jsonl"))
    }

    /// Both runs left the same weights and completions.
    fn same(&self, a: &str, b: &str) {
        for file in ["model.safetensors", "completions.jsonl"] {
            let read = |out: &str| std::fs::read(self.path(out).join(file)).unwrap();
            assert!(read(a) == read(b), "{file} of {a} and {b}");
        }
    }
}

fn roles(line: &Value) -> Vec<&str> {
    let messages = line["completion"].as_array().unwrap();
    messages.iter().map(|m| m["role"].as_str().unwrap()).collect()
}

const GROUP: &str = "num_generations=4";

#[test]
fn the_first_ratio_is_one_over_turns_and_observations_are_no_targets() {
    for dtype in [DType::F32, DType::BF16] {
        let mut setup = Setup::new(&letters(""));
        // The functions of a program see the whole conversation.
        setup.rewards = vec![RewardFunction::new("fits", |row| {
            assert!(row.ids().len() <= 80, "{} tokens", row.ids().len());
            Some(0.0)
        })];
        let keys = [GROUP, "num_iterations=2", "beta=0.1", "temperature=0.8"];
        let log = setup.go::<GrpoConfig>("out", &keys, false, dtype).unwrap();
        let value = |i: usize, name: &str| {
            log[i][name].as_f64().unwrap_or_else(|| panic!("{name}: {:?}", log[i]))
        };
        for i in [0, 2] {
            assert_eq!(value(i, "sampling/ratio_off_one_max"), 0.0, "{dtype:?} step {i}");
            assert!(value(i, "environment/mean_turns") > 1.5, "{:?}", log[i]);
            // What the environment says is several times as long, and no completion's length.
            let (own, theirs) =
                (value(i, "completions/mean_length"), value(i, "environment/mean_tokens"));
            assert!(own < 40.0 && theirs > 10.0 && own + theirs <= 80.0, "{own} {theirs}");
        }
        assert_eq!(value(0, "kl"), 0.0);
        assert!([1, 3].iter().any(|i| value(*i, "sampling/ratio_off_one_max") > 0.0));
        let lines = setup.completions("out");
        assert!(lines.iter().any(|l| l["rewards"]["environment"].as_f64() > Some(0.0)));
        let all: Vec<Vec<&str>> = lines.iter().map(roles).collect();
        let three = |a, b| ["assistant", a, "assistant", b, "assistant"];
        assert!(all.iter().any(|r| *r == three("user", "user") || *r == three("user", "tool")));
        for roles in &all {
            assert!(roles.iter().step_by(2).all(|r| *r == "assistant") && roles.len() <= 5);
        }
    }
}

#[test]
fn runs_with_an_environment_resume_with_the_same_bytes() {
    fn resumes<M: BuildMethod + Default + 'static>(name: &str, keys: &[&str]) {
        let setup = Setup::new(&letters(""));
        let log = setup.go::<M>("whole", keys, false, DType::F32).unwrap();
        assert_eq!(log.len(), 4, "{name}");
        let part = setup.path("part/checkpoint-2");
        std::fs::create_dir_all(&part).unwrap();
        for file in ["config.toml", "metrics.jsonl", "completions.jsonl"] {
            std::fs::copy(setup.path("whole").join(file), setup.path("part").join(file)).unwrap();
        }
        for file in std::fs::read_dir(setup.path("whole/checkpoint-2")).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), part.join(file.file_name())).unwrap();
        }
        setup.go::<M>("part", keys, true, DType::F32).unwrap();
        setup.same("whole", "part");
    }
    // A generation of three passes: step 2 is in the middle of one.
    resumes::<GrpoConfig>("grpo", &[GROUP, "num_iterations=3", "beta=0.1"]);
    resumes::<RlooConfig>("rloo", &[GROUP]);
    resumes::<ReinforceConfig>("reinforce++", &[GROUP, "group_baseline=true"]);
    resumes::<ReinforceConfig>("remax", &[GROUP, "greedy_baseline=true"]);
    resumes::<PpoConfig>("ppo", &["num_ppo_epochs=3", "temperature=1"]);
}

#[test]
fn neither_time_nor_order_of_the_answers_changes_a_run() {
    let mut setup = Setup::new(&letters(""));
    setup.go::<GrpoConfig>("at once", &[GROUP], false, DType::F32).unwrap();
    // Some answers come late, others later than the ones asked for after them.
    let slow = "[ $((id % 3)) = 0 ] && sleep 0.02;";
    setup.environment = letters(slow);
    setup.go::<GrpoConfig>("late", &[GROUP, "max_sequences=3"], false, DType::F32).unwrap();
    setup.same("at once", "late");
    setup.environment = shell(&format!("({}) &", letters_step(slow)));
    setup.go::<GrpoConfig>("any order", &[GROUP, "max_sequences=5"], false, DType::F32).unwrap();
    setup.same("at once", "any order");
}

#[test]
fn a_run_whose_environment_was_started_again_has_the_same_bytes() {
    let mut setup = Setup::new(&letters(""));
    setup.go::<GrpoConfig>("whole", &[GROUP], false, DType::F32).unwrap();
    // It dies once, with episodes of several turns open.
    let died = setup.path("died");
    let dies = format!(
        "n=$((n + 1)); if [ $n = 30 ] && ! [ -e {0} ]; then touch {0}; exit 3; fi;",
        died.display()
    );
    setup.environment = letters(&dies);
    let keys = [GROUP, "environment_restarts=1", "max_sequences=4"];
    setup.go::<GrpoConfig>("again", &keys, false, DType::F32).unwrap();
    assert!(died.exists());
    setup.same("whole", "again");
}

#[test]
fn turns_and_tokens_have_limits() {
    let mut setup = Setup::new(&letters(""));
    for (most, turns) in [(0, 1), (1, 2)] {
        let (out, key) = (format!("most{most}"), format!("max_tool_calling_iterations={most}"));
        setup.go::<GrpoConfig>(&out, &[GROUP, &key], false, DType::F32).unwrap();
        let lines = setup.completions(&out);
        let count = |l: &Value| roles(l).iter().filter(|r| **r == "assistant").count();
        assert_eq!(lines.iter().map(count).max(), Some(turns));
        assert!(lines.iter().all(|l| roles(l).last() == Some(&"assistant")));
    }
    // An answer that leaves no room ends the completion, which is not finished then.
    let long = say(&format!(r#""observation": "{}""#, "x".repeat(100)));
    setup.environment = shell(&long);
    setup
        .go::<GrpoConfig>("long", &[GROUP, "reward_funcs=length:max=9"], false, DType::F32)
        .unwrap();
    for line in setup.completions("long") {
        assert_eq!((roles(&line), &line["finished"]), (vec!["assistant"], &json!(false)));
    }
}

#[test]
fn what_an_environment_does_wrong_ends_the_run_with_a_checkpoint() {
    let setup = Setup::new(&shell(
        "n=$((n + 1)); [ $n = 40 ] && exit 7; echo \"{\\\"id\\\": $id, \\\"done\\\": true, \\\"reward\\\": $((n % 2))}\"",
    ));
    let keys = [GROUP, "environment_restarts=0", "max_steps=20"];
    let error = setup.go::<GrpoConfig>("out", &keys, false, DType::F32).unwrap_err().to_string();
    for part in ["environment, ", "chat_prompt_completion.jsonl:", "exit status: 7", "resume"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    let names = std::fs::read_dir(setup.path("out")).unwrap();
    let mut names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(names.any(|n| n.starts_with("checkpoint-")));
}

#[test]
fn methods_without_turns_know_no_environment() {
    let setup = Setup::new("");
    let error = setup.go::<OnlineDpoConfig>("out", &[], false, DType::F32).unwrap_err().to_string();
    assert!(error.contains("environment"), "{error}");
    let idle = MethodRun::<GrpoConfig>::load(
        None,
        &["reward_funcs=think_format".into(), "max_tool_calling_iterations=3".into()],
    );
    let error = idle.unwrap_err().to_string();
    assert!(error.contains("environment is \"none\""), "{error}");
    let nothing = MethodRun::<GrpoConfig>::load(None, &["environment= ".into()]);
    assert!(nothing.unwrap_err().to_string().contains("environment is empty"));
}

/// An environment with three episodes; the answers to their first turns, in order of the episode.
fn first_turns(command: &str, timeout: f64, restarts: usize) -> Result<Vec<EnvironmentAnswer>> {
    let mut environment = Environment::new(command, Duration::from_secs_f64(timeout), restarts);
    let columns = Map::from_iter([("answer".to_string(), json!(4))]);
    for episode in 0..3 {
        let place = format!("rows.jsonl:{}", episode + 1);
        environment.reset(episode, place, 5, &json!("1 + 3 ="), &columns);
        let turn =
            EnvironmentTurn { turn: 1, text: "é4", ids: &[7], last: false, truncated: false };
        environment.step(episode, &turn);
    }
    let mut all = vec![EnvironmentAnswer::default(); 3];
    while let Some((episode, answer)) = environment.hear(true, &Silent)? {
        all[episode] = answer;
    }
    Ok(all)
}

fn fails(step: &str, restarts: usize) -> String {
    let begin = Instant::now();
    let error = first_turns(&shell(step), 60.0, restarts).unwrap_err().to_string();
    assert!(begin.elapsed() < Duration::from_secs(30), "its children were waited for");
    error
}

#[test]
fn an_environment_sees_rows_and_turns() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let step = say(r#""reward": true, "observation": "8""#);
    // Logged before they are passed on: what is answered is in the log.
    let pass = format!("printf '%s\\n' \"$line\" >> {}; printf '%s\\n' \"$line\"", log.display());
    let command = format!("while read -r line; do {pass}; done | {}", shell(&step));
    let answers = first_turns(&command, 30.0, 0).unwrap();
    let want = EnvironmentAnswer { observation: Some(json!("8")), reward: Some(1.0), done: false };
    assert_eq!(answers, vec![want; 3]);
    let lines: Vec<Value> = json_lines(log);
    let reset = json!({ "id": 1, "op": "reset", "episode": 1, "seed": 5, "prompt": "1 + 3 =", "columns": { "answer": 4 } });
    assert!(lines.contains(&reset), "{lines:?}");
    let of = |l: &&Value| l["op"] == "step" && l["episode"] == 2;
    let mut turn = lines.iter().find(of).unwrap().clone();
    turn.as_object_mut().unwrap().remove("id");
    let want = json!({ "op": "step", "episode": 2, "turn": 1, "completion": "é4", "completion_ids": [7], "last": false,
        "truncated": false });
    assert_eq!(turn, want);
    assert_eq!(lines.len(), 6);
}

#[test]
fn an_environment_that_crashes_is_reported_with_row_turn_and_last_words() {
    let crash = "[ \"${line#*episode?:1}\" != \"$line\" ] && { echo out of luck >&2; exit 7; };";
    let error = fails(&format!("{crash} {}", say(r#""done": true"#)), 0);
    for part in ["environment, rows.jsonl:2, turn 1", "exit status: 7", "out of luck"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    // Each start ends at the same turn.
    let error = fails(&format!("{crash} {}", say(r#""done": true"#)), 2);
    assert!(error.contains("rows.jsonl:2, turn 1"), "{error}");
    let error = first_turns("/nowhere/environment", 0.5, 3).unwrap_err().to_string();
    assert!(error.contains("/nowhere/environment") && error.contains("reset"), "{error}");
}

#[test]
fn an_environment_that_hangs_floods_or_leaves_is_ended() {
    let error = first_turns(&shell("sleep 100"), 2.0, 0).unwrap_err().to_string();
    assert!(error.contains("within 2 s (environment_timeout)"), "{error}");
    assert!(error.contains("environment, rows.jsonl:1, "), "{error}");
    let error = fails("head -c 40000000 /dev/zero | tr '\\0' x; sleep 20", 0);
    assert!(error.contains("longer than 16 MiB"), "{error}");
    let error = fails("yes '{\"id\": 99999}'", 0);
    assert!(error.contains("the \"id\" of a request"), "{error}");
    let error = first_turns("read -r line; exec 1>&-; sleep 100", 30.0, 0).unwrap_err().to_string();
    assert!(error.contains("its stdout is closed"), "{error}");
    let error = first_turns("true", 30.0, 0).unwrap_err().to_string();
    assert!(error.contains("it ended (exit status: 0)"), "{error}");
}

#[test]
fn garbage_from_an_environment_is_shown_as_it_came() {
    for (step, want) in [
        ("echo 'no json at all'".to_string(), "`no json at all`"),
        ("echo '[1]'".to_string(), "expected a JSON object"),
        (say(r#""reward": "high", "done": true"#), "expected \"reward\": NUMBER or null"),
        (say(r#""done": 1"#), "expected \"done\": true or false"),
        (say(r#""observation": 8"#), "a text, or messages"),
        (say(r#""observation": []"#), "a text, or messages"),
        (say(r#""observation": [{"role": "assistant", "content": "x"}]"#), "a role other than"),
        (say(r#""reward": 1"#), "expected an \"observation\" or \"done\": true"),
    ] {
        let error = fails(&step, 0);
        assert!(error.contains(want) && error.contains("turn 1"), "{want}: {error}");
    }
    // A reset has nothing to say.
    let error = first_turns(
        "read -r line; echo '{\"id\": 0, \"observation\": \"hi\"}'; cat > /dev/null",
        9.0,
        0,
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("only an id") && error.contains("reset"), "{error}");
    let error = fails(&say(r#""error": "no such file""#), 5);
    assert!(error.contains("it says: no such file"), "{error}");
}

#[test]
fn a_restarted_environment_hears_its_episodes_again_and_must_not_change_its_mind() {
    let dir = tempfile::tempdir().unwrap();
    let starts = dir.path().join("starts");
    let start = format!("echo x >> {0}; starts=$(wc -l < {0});", starts.display());
    let dies = "n=$((n + 1)); [ $starts = 1 ] && [ $n = 3 ] && exit 3;";
    let steady = say(r#""observation": "8""#);
    let answers = first_turns(&format!("{start} {}", shell(&format!("{dies} {steady}"))), 60.0, 1);
    let want = EnvironmentAnswer { observation: Some(json!("8")), ..Default::default() };
    assert_eq!(answers.unwrap(), vec![want; 3]);
    assert_eq!(std::fs::read_to_string(&starts).unwrap().lines().count(), 2);
    std::fs::remove_file(&starts).unwrap();
    let fickle = "echo \"{\\\"id\\\": $id, \\\"observation\\\": \\\"$starts\\\"}\"";
    let error = first_turns(&format!("{start} {}", shell(&format!("{dies} {fickle}"))), 60.0, 9);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("answered turn 1 differently"), "{error}");
}

#[test]
fn ctrl_c_is_heard_while_an_environment_is_silent() {
    let mut environment = Environment::new(&shell("sleep 1000"), Duration::from_secs(900), 0);
    let stop = Stop::default();
    environment.govern(&stop, None);
    environment.reset(0, "rows.jsonl:1".into(), 1, &json!("p"), &Map::new());
    let turn = EnvironmentTurn { turn: 1, text: "4", ids: &[7], last: true, truncated: false };
    environment.step(0, &turn);
    let later = stop.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        later.request();
    });
    let begin = Instant::now();
    let error = environment.hear(true, &Silent).unwrap_err();
    assert!(matches!(error, temper::Error::Interrupted(_)), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(20));
}

/// Without python3 this fails rather than passing unseen: `--skip needs_python3` leaves it out.
#[test]
fn the_calculator_of_the_examples_answers_needs_python3() {
    let command = "python3 examples/env/calculator.py";
    let mut environment = Environment::new(command, Duration::from_secs(60), 0);
    let columns = Map::from_iter([("answer".to_string(), json!("9"))]);
    environment.reset(0, "rows.jsonl:1".into(), 1, &json!("p"), &columns);
    let observed = |text: &str| Some(json!(text));
    let again = observed("That is not right. Try again.");
    for (i, (text, observation, reward, done)) in [
        ("18-4-5=", observed("9"), 0.0, false),
        ("<calc>(2 + 1) * -3.5</calc>", observed("-10.5"), 0.0, false),
        ("<calc>1/0</calc>", observed("error: division by zero"), 0.0, false),
        (
            "<calc>9**9**9</calc>",
            observed("error: not an expression of numbers, + - * / and brackets"),
            0.0,
            false,
        ),
        ("18-4=14. The answer is 14.", again, 0.0, false),
        ("The answer is 9.", None, 0.5, true),
    ]
    .into_iter()
    .enumerate()
    {
        let turn = EnvironmentTurn { turn: i + 1, text, ids: &[], last: false, truncated: false };
        environment.step(0, &turn);
        let heard = environment.hear(true, &Silent).unwrap();
        let want = EnvironmentAnswer { observation, reward: Some(reward), done };
        assert_eq!(heard, Some((0, want)), "{text}");
    }
}
