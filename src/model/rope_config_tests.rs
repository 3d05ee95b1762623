use super::*;

fn object(json: Value) -> Map<String, Value> {
    json.as_object().cloned().unwrap_or_default()
}

fn parse(json: Value) -> (RopeConfig, Vec<String>) {
    let mut problems = Vec::new();
    (one_rope(&object(json), &RopeFacts::SMALL, &mut problems), problems)
}

fn layered(rule: RopeRule, json: Value, sliding: &[bool]) -> (LayerRopes, Vec<String>) {
    let mut problems = Vec::new();
    let facts = RopeFacts { default_theta: 1e6, ..RopeFacts::SMALL };
    (layer_ropes(&object(json), rule, &facts, sliding, &mut problems), problems)
}

const SOME: RopeRule = RopeRule::SomeLayers { default_interval: 4 };
const BY_TYPE: RopeRule = RopeRule::ByLayerType { default_sliding_theta: 1e4 };

#[test]
fn old_and_new_keys_mean_the_same() {
    let scaling = json!({ "type": "linear", "factor": 2.0 });
    let (old, _) = parse(json!({ "rope_theta": 5e5, "rope_scaling": scaling }));
    let linear = RopeKind::Linear { factor: 2.0 };
    assert_eq!(old, RopeConfig { kind: linear, ..RopeConfig::plain(5e5) });
    let new = json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5 });
    assert_eq!(parse(json!({ "rope_parameters": new })).0, old);
    let both = json!({ "rope_theta": 1.0, "rope_scaling": null, "rope_parameters": new });
    assert_eq!(parse(both).0, old);
    assert_eq!(parse(json!({})).0, RopeConfig::plain(1e4));
}

#[test]
fn bad_settings_are_all_reported() {
    let bad = json!({ "rope_parameters": { "rope_type": "dynamic", "rope_theta": -1,
                                           "partial_rotary_factor": 1.5 } });
    let (_, problems) = parse(bad);
    assert_eq!(problems.len(), 3, "{problems:?}");
    let dynamic = "\"dynamic\"; supported: default, linear, llama3, yarn, longrope";
    assert!(problems.iter().any(|p| p.contains(dynamic)), "{problems:?}");
    let (_, problems) = parse(json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8 } }));
    assert_eq!(problems.len(), 2, "{problems:?}");
    let (_, problems) = parse(json!({ "partial_rotary_factor": 0.2 }));
    assert!(
        problems[0].contains("0.2 of head_dim 16 is 3, but rope rotates pairs"),
        "{problems:?}"
    );
    let lists = json!({ "rope_type": "longrope", "short_factor": [1, 2, 3], "long_factor": null });
    let (_, problems) = parse(json!({ "rope_scaling": lists }));
    assert!(
        problems[0].contains("short_factor has 3 numbers above 0 in 3 entries; it must have 8")
    );
    assert!(problems[1].contains("long_factor is missing"), "{problems:?}");
}

#[test]
fn longrope_has_several_names_and_a_factor_of_its_own() {
    let eight = |x: f64| vec![x; 8];
    for name in ["longrope", "su", "yarn"] {
        let scaling =
            json!({ "type": name, "short_factor": eight(1.0), "long_factor": eight(4.0) });
        let (config, problems) =
            parse(json!({ "rope_scaling": scaling, "original_max_position_embeddings": 32 }));
        assert!(problems.is_empty(), "{problems:?}");
        let RopeKind::LongRope { short, long, original_max_positions, attention_factor } =
            &config.kind
        else {
            panic!("{config:?}")
        };
        assert_eq!((short, long), (&eight(1.0), &eight(4.0)));
        // max / original = 4
        assert_eq!(*original_max_positions, 32.0);
        assert_eq!(*attention_factor, (1.0 + 4f64.ln() / 32f64.ln()).sqrt());
        assert!(!config.is_long(32) && config.is_long(33));
    }
}

#[test]
fn longrope_is_written_for_old_readers_too() {
    let new = json!({
        "original_max_position_embeddings": 32,
        "rope_parameters": { "rope_type": "longrope", "rope_theta": 1e4,
            "partial_rotary_factor": 0.5, "short_factor": [1, 1, 1, 1], "long_factor": [2, 3, 4, 5],
            "original_max_position_embeddings": 32 }
    });
    let (config, problems) = parse(new.clone());
    assert!(problems.is_empty() && config.turned(16) == 8, "{problems:?}");
    let mut both = object(new);
    both_forms(&mut both, RopeRule::Every, std::slice::from_ref(&config));
    let old =
        json!({ "type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [2, 3, 4, 5] });
    assert_eq!((&both["rope_scaling"], &both["partial_rotary_factor"]), (&old, &json!(0.5)));
    assert_eq!(parse(Value::Object(both.clone())).0, config);
    both.remove("rope_parameters");
    assert_eq!(parse(Value::Object(both)).0, config);
}

#[test]
fn layers_without_rope_are_listed_or_counted() {
    let kinds = |json: Value, layers: usize| {
        let ((ropes, of), problems) = layered(SOME, json, &vec![false; layers]);
        assert_eq!((ropes.len(), ropes[0].theta), (1, 1e6));
        (of.into_iter().map(|k| k.is_some()).collect::<Vec<_>>(), problems)
    };
    assert_eq!(kinds(json!({}), 5).0, [true, true, true, false, true]);
    let every_second = json!({ "no_rope_layer_interval": 2 });
    assert_eq!(kinds(every_second, 4).0, [true, false, true, false]);
    let listed = json!({ "no_rope_layers": [0, 1, 1], "no_rope_layer_interval": 1 });
    assert_eq!(kinds(listed, 3).0, [false, true, true]);
    let (_, problems) = kinds(json!({ "no_rope_layers": [0, 2] }), 3);
    assert!(problems[0].contains("no_rope_layers has 2 entries, num_hidden_layers is 3"));
    assert!(problems[1].contains("no_rope_layers has 2; it must be"), "{problems:?}");
}

#[test]
fn layer_types_have_a_rope_each_in_either_form() {
    let linear = RopeKind::Linear { factor: 8.0 };
    let want = (
        vec![RopeConfig { kind: linear, ..RopeConfig::plain(2e6) }, RopeConfig::plain(3e4)],
        vec![Some(1), Some(0), Some(1)],
    );
    let sliding = [true, false, true];
    let old = json!({ "rope_theta": 2e6, "rope_local_base_freq": 3e4,
                      "rope_scaling": { "rope_type": "linear", "factor": 8.0 } });
    let full = json!({ "rope_type": "linear", "factor": 8.0, "rope_theta": 2e6 });
    let new = json!({ "rope_parameters": { "full_attention": full,
        "sliding_attention": { "rope_type": "default", "rope_theta": 3e4 } } });
    for json in [old, new] {
        let (got, problems) = layered(BY_TYPE, json.clone(), &sliding);
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(got, want, "{json}");
        let mut both = object(json);
        both_forms(&mut both, BY_TYPE, &got.0);
        for key in ["rope_theta", "rope_local_base_freq", "rope_scaling"] {
            let mut without = both.clone();
            assert!(without.remove(key).is_some(), "{key}");
            let got = layered(BY_TYPE, Value::Object(without), &sliding);
            assert_eq!((got.0, got.1.len()), (want.clone(), 0), "without {key}");
        }
        both.remove("rope_parameters");
        assert_eq!(layered(BY_TYPE, Value::Object(both), &sliding).0, want);
    }
    let plain = layered(BY_TYPE, json!({}), &sliding).0;
    assert_eq!(plain.0, [RopeConfig::plain(1e6), RopeConfig::plain(1e4)]);
    let (_, problems) =
        layered(RopeRule::Every, json!({ "rope_parameters": { "full_attention": {} } }), &sliding);
    assert!(problems[0].contains("one rope per layer type"), "{problems:?}");
}
