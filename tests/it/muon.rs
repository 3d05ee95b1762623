//! `optim=muon` against torch.optim.Muon (Newton-Schulz in float32): every run of
//! `tests/fixtures/muon.json`.

use temper::autograd::Recompute;
use temper::checkpoint::{CheckpointWriter, checkpoint_path};
use temper::methods::offline::OfflineMethod;
use temper::methods::offline::sft::{Sft, SftRun};
use temper::model::specs::ParamSpec;
use temper::optim::state::Moments;
use temper::train::Trainer;
use temper::train::state::{FolderParts, RunState};

use crate::support::{cpu, fixture, floats, json, strings};
use crate::{peft, sft};

fn start(rows: &str, keys: &[String], adapter: bool) -> (Trainer, OfflineMethod<Sft>) {
    if !adapter {
        return sft::trainer(rows, keys, Recompute::Off);
    }
    let cx = cpu();
    let (decoder, run) = peft::model(&cx, "sft/model", "lora", keys);
    peft::trainer(cx, decoder, &run)
}

fn keys(own: &[String]) -> Vec<String> {
    let mut keys = strings(&[
        "optim=muon",
        "per_device_train_batch_size=4",
        "train_sampling_strategy=sequential",
        "max_steps=20",
    ]);
    keys.extend(own.iter().cloned());
    keys
}

#[test]
fn every_run_has_the_losses_of_torchs_muon() {
    let all = json(fixture("muon.json"));
    let (mut report, mut worst) = (String::new(), 0f64);
    for (name, run) in all.as_object().unwrap() {
        let own: Vec<String> = serde_json::from_value(run["keys"].clone()).unwrap();
        let (mut trainer, mut sft) =
            start(run["rows"].as_str().unwrap(), &keys(&own), name == "lora");
        let (losses, norms) = (floats(&run["loss"]), floats(&run["grad_norm"]));
        let (mut loss, mut norm) = (0f64, 0f64);
        for i in 0..20 {
            let step = trainer.step(&mut sft).unwrap();
            loss = loss.max((f64::from(step.loss) / losses[i] - 1.0).abs());
            norm = norm.max((f64::from(step.grad_norm) / norms[i] - 1.0).abs());
        }
        let params = trainer.model.trained();
        let values = params.trained().map(|i| trainer.optimizer.values(params, i).unwrap());
        let squares: f64 = values.flatten().map(|v| f64::from(v).powi(2)).sum();
        let squares = (squares / run["squares"].as_f64().unwrap() - 1.0).abs();
        report +=
            &format!("{name}: loss {loss:.1e}, grad_norm {norm:.1e}, squares {squares:.1e}\n");
        assert!(norm <= 1e-4 && squares <= 1e-5, "{report}");
        worst = worst.max(loss);
    }
    println!("{report}");
    assert!(worst <= 1e-5, "{report}");
}

/// Weights and state, bit for bit.
fn bits(trainer: &Trainer) -> Vec<Vec<u8>> {
    let mut all = vec![trainer.model.trained().weights.to_bytes().unwrap()];
    all.extend(trainer.optimizer.moments.named_tensors().iter().map(|t| t.1.to_bytes().unwrap()));
    all
}

#[test]
fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
    for adapter in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let parts = FolderParts::default();
        let keys = keys(&strings(&["learning_rate=1e-2", "weight_decay=0.1", "max_steps=6"]));
        let (mut whole, mut method) = start("messages", &keys, adapter);
        for step in 1..=6u64 {
            whole.step(&mut method).unwrap();
            if step == 3 {
                let mut writer =
                    CheckpointWriter::new(dir.path(), step, whole.state_bytes(&parts)).unwrap();
                whole.write_state(&mut writer, &parts, &RunState::default()).unwrap();
                writer.finish().unwrap();
            }
        }
        let (mut resumed, mut method) = start("messages", &keys, adapter);
        resumed.read_state(&checkpoint_path(dir.path(), 3)).unwrap();
        while resumed.done < 6 {
            resumed.step(&mut method).unwrap();
        }
        assert!(bits(&resumed) == bits(&whole), "adapter {adapter}");
        // State of another optimizer is refused.
        let adamw = [keys.clone(), vec!["optim=adamw".into()]].concat();
        let (mut wrong, _) = start("messages", &adamw, adapter);
        let e = wrong.read_state(&checkpoint_path(dir.path(), 3)).unwrap_err().to_string();
        assert!(e.contains("optimizer.safetensors"), "{e}");
    }
}

#[test]
fn matrices_of_layers_have_one_moment_and_the_rest_two() {
    let (trainer, _) = start("messages", &keys(&[]), false);
    let Moments::Muon(moments) = &trainer.optimizer.moments else { panic!() };
    let params = &trainer.model.params;
    let (matrices, rest): (Vec<_>, Vec<_>) =
        params.specs.iter().partition(|spec| spec.role.is_layer_matrix());
    let values = |specs: &[&ParamSpec]| specs.iter().map(|s| s.len()).sum::<usize>();
    assert_eq!(moments.m.numel(), params.state_len);
    // A parameter and a range begin at whole multiples of 128 values.
    let (least, slack) = (values(&rest), 128 * (rest.len() + 2));
    assert!((least..least + slack).contains(&moments.v.numel()), "{least} {}", moments.v.numel());
    let matrices = values(&matrices);
    assert!(matrices > 0 && moments.v.numel() + matrices / 2 < params.state_len);
}

#[test]
fn options_of_muon_are_checked() {
    let said = |keys: &[&str]| SftRun::load(None, &strings(keys)).unwrap_err().to_string();
    assert!(said(&["muon_momentum=0.9"]).contains("optim is not \"muon\""));
    assert!(said(&["optim=muon", "muon_momentum=1"]).contains("below 1"));
    assert!(said(&["optim=muon", "muon_ns_steps=0"]).contains("must be from 1 to 99"));
    let zero = ["optim=muon", "learning_rate=0", "muon_learning_rate=1e-2"];
    assert!(said(&zero).contains("learning_rate must be above 0"));
}
