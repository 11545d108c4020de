//! Secrets: who has them, what a node hears of them, and that nothing of a value is in the file.

use sandgate_api::{credential::Sensitive, id::SecretId, rest::EgressBinding};

use super::*;
use crate::vault::Vault;

const VALUE: &str = "sk-ant-canary-value-0123456789";

fn vault() -> Vault {
    Vault::new(&[9; 32]).expect("a vault")
}

fn bound() -> Option<Vec<EgressBinding>> {
    crate::presets::bindings("ANTHROPIC_API_KEY")
}

impl World {
    async fn secret(&self, name: &str, egress: Option<Vec<EgressBinding>>) -> SecretRecord {
        let value = Sensitive::new(VALUE.to_owned());
        let new = NewSecret {
            id: SecretId::random(),
            org_id: self.org.clone(),
            name: name.to_owned(),
            scope: "sandbox".to_owned(),
            egress,
            placeholder_prefix: "sk-ant-".to_owned(),
            sealed: vault().seal(&self.org, name, &value).expect("sealed"),
            created_at: now(),
        };
        self.store.insert_secret(&new, 100).await.expect("inserted")
    }

    /// On the feed and running, with these secrets from its creation on.
    async fn holder(&self, last: u8, secrets: SecretChoice) -> SandboxId {
        let new = NewSandbox {
            secrets,
            authority: Some(AuthorityRecord {
                generation: 1,
                certificate: "PEM".to_owned(),
            }),
            ..new_sandbox(&self.org, None)
        };
        let id = self.store.insert_sandbox(&new, 100).await.expect("inserted").id;
        self.store
            .announce(&id, &endpoint(last))
            .await
            .expect("announced");
        self.store.mark_running(&id).await.expect("running");
        id
    }

    async fn on_feed(&self, id: &SandboxId) -> FeedSandbox {
        let FeedFrame::Snapshot { sandboxes, .. } = self.since(None).await.frame else {
            panic!("not a snapshot");
        };
        let found = sandboxes.into_iter().find(|sandbox| sandbox.sandbox_id == *id);
        found.expect("on the feed")
    }
}

#[tokio::test]
async fn a_new_sandbox_has_what_was_chosen_and_a_placeholder_of_its_own() {
    let world = world().await;
    let secret = world.secret("A_KEY", bound()).await;
    world.secret("PLAIN", None).await;
    let (one, other) = (
        world.holder(1, SecretChoice::All).await,
        world
            .holder(2, SecretChoice::Named(vec!["A_KEY".to_owned()]))
            .await,
    );
    let none = world.holder(3, SecretChoice::None).await;
    let names = |secrets: Vec<SandboxSecret>| -> Vec<String> {
        secrets.into_iter().map(|own| own.secret.name).collect()
    };
    let own = |id: SandboxId| async { world.store.sandbox_secrets(&{ id }).await.expect("secrets") };
    assert_eq!(names(own(one.clone()).await), ["A_KEY", "PLAIN"]);
    assert_eq!(names(own(other.clone()).await), ["A_KEY"]);
    assert!(own(none.clone()).await.is_empty());

    let (first, second) = (world.on_feed(&one).await, world.on_feed(&other).await);
    assert_eq!(first.ca_generation, 1);
    // A plain variable is not on the feed: the node has nothing to do with it.
    assert_eq!(first.bindings.len(), 1);
    let binding = &first.bindings[0];
    assert_eq!(
        (binding.secret.as_str(), binding.version),
        ("A_KEY", secret.version)
    );
    assert_eq!(binding.hosts, ["api.anthropic.com"]);
    assert_eq!(binding.placeholders, [own(one).await[0].placeholder.clone()]);
    assert!(binding.placeholders[0].starts_with("sk-ant-sgp0"));
    assert_ne!(binding.placeholders, second.bindings[0].placeholders);
    assert!(world.on_feed(&none).await.bindings.is_empty());
}

#[tokio::test]
async fn an_unknown_secret_is_refused_and_no_sandbox_is_left() {
    let world = world().await;
    world.secret("A_KEY", bound()).await;
    let names = vec!["A_KEY".to_owned(), "NO_KEY".to_owned()];
    let new = NewSandbox {
        secrets: SecretChoice::Named(names),
        ..new_sandbox(&world.org, None)
    };
    let error = world.store.insert_sandbox(&new, 100).await.expect_err("refused");
    assert!(
        matches!(error, StoreError::Conflict(Conflict::NoSuchSecret { index: 1 })),
        "{error}"
    );
    assert_eq!(
        world.store.sandbox(&world.org, &new.id).await.expect("a reading"),
        None
    );
    let stranger = organization(&world.store, "second@example.org").await;
    let foreign = NewSandbox {
        secrets: SecretChoice::Named(vec!["A_KEY".to_owned()]),
        ..new_sandbox(&stranger, None)
    };
    assert!(
        world.store.insert_sandbox(&foreign, 100).await.is_err(),
        "another's secret"
    );
}

#[tokio::test]
async fn a_rotation_is_a_delta_with_another_version_and_the_same_placeholders() {
    let world = world().await;
    let secret = world.secret("A_KEY", bound()).await;
    let holder = world.holder(1, SecretChoice::All).await;
    let other = world.holder(2, SecretChoice::None).await;
    let before = world.on_feed(&holder).await;
    let seen = world.since(None).await.revision;
    let fresh = Sensitive::new("ghp_another-value".to_owned());
    let update = SecretUpdate {
        value: Some((
            vault().seal(&world.org, "A_KEY", &fresh).expect("sealed"),
            "ghp_".to_owned(),
        )),
        egress: None,
    };
    let (changed, change) = world
        .store
        .update_secret(&secret, update.clone(), now())
        .await
        .expect("updated");
    assert_eq!(change.concerns, std::slice::from_ref(&holder));
    assert!(changed.version > secret.version);
    let (upserts, removed) = delta(world.since(Some(seen)).await);
    assert!(removed.is_empty() && upserts.iter().all(|sandbox| sandbox.sandbox_id != other));
    assert_eq!(upserts.len(), 1);
    assert_eq!(upserts[0].bindings[0].version, changed.version);
    assert_eq!(
        upserts[0].bindings[0].placeholders,
        before.bindings[0].placeholders
    );
    // Whoever still works with the version before is refused.
    let stale = world
        .store
        .update_secret(&secret, update, now())
        .await
        .expect_err("stale");
    assert!(
        matches!(stale, StoreError::Conflict(Conflict::WrongState)),
        "{stale}"
    );
}

#[tokio::test]
async fn a_deletion_takes_the_binding_and_its_placeholders_from_every_sandbox() {
    let world = world().await;
    let first = world.secret("A_KEY", bound()).await;
    let holder = world.holder(1, SecretChoice::All).await;
    let seen = world.since(None).await.revision;
    let change = world
        .store
        .delete_secret(&world.org, "A_KEY")
        .await
        .expect("done")
        .expect("was there");
    assert_eq!(change.concerns, std::slice::from_ref(&holder));
    let (upserts, _) = delta(world.since(Some(seen)).await);
    assert_eq!(upserts.len(), 1);
    assert!(upserts[0].bindings.is_empty());
    assert_eq!(
        world
            .store
            .bound_secret(&holder, "A_KEY")
            .await
            .expect("a reading"),
        None
    );
    assert_eq!(
        world
            .store
            .delete_secret(&world.org, "A_KEY")
            .await
            .expect("done"),
        None
    );
    // Made again under the same name it is another secret: nobody has it, and its version is another.
    let again = world.secret("A_KEY", bound()).await;
    assert!(again.version > first.version);
    assert!(
        world
            .store
            .sandbox_secrets(&holder)
            .await
            .expect("a reading")
            .is_empty()
    );
}

#[tokio::test]
async fn an_injection_gives_a_running_sandbox_what_it_lacks_and_keeps_what_it_has() {
    let world = world().await;
    world.secret("A_KEY", bound()).await;
    let holder = world.holder(1, SecretChoice::All).await;
    let before = world.on_feed(&holder).await.bindings;
    world.secret("B_KEY", bound()).await;
    let seen = world.since(None).await.revision;
    let (names, change) = world
        .store
        .inject_secrets(&holder, &SecretChoice::All)
        .await
        .expect("injected");
    assert_eq!(names, ["A_KEY", "B_KEY"]);
    assert_eq!(change.concerns, std::slice::from_ref(&holder));
    let (upserts, _) = delta(world.since(Some(seen)).await);
    assert_eq!(upserts[0].bindings.len(), 2);
    assert_eq!(upserts[0].bindings[0], before[0]);
    let unknown = SecretChoice::Named(vec!["NO_KEY".to_owned()]);
    let error = world
        .store
        .inject_secrets(&holder, &unknown)
        .await
        .expect_err("refused");
    assert!(matches!(
        error,
        StoreError::Conflict(Conflict::NoSuchSecret { index: 0 })
    ));
    world.store.withdraw(&holder).await.expect("withdrawn");
    let ended = world
        .store
        .inject_secrets(&holder, &SecretChoice::All)
        .await
        .expect_err("refused");
    assert!(matches!(ended, StoreError::Conflict(Conflict::WrongState)));
}

#[tokio::test]
async fn only_bound_secrets_of_a_sandbox_on_the_feed_can_be_leased() {
    let world = world().await;
    world.secret("A_KEY", bound()).await;
    world.secret("PLAIN", None).await;
    world.secret("LATER", bound()).await;
    let names = vec!["A_KEY".to_owned(), "PLAIN".to_owned()];
    let holder = world.holder(1, SecretChoice::Named(names)).await;
    let leased = async |name: &str| world.store.bound_secret(&holder, name).await.expect("a reading");
    let record = leased("A_KEY").await.expect("a secret");
    let value = vault()
        .unseal(&world.org, "A_KEY", &record.sealed)
        .expect("opened");
    assert_eq!(value.expose(), VALUE);
    assert_eq!(leased("PLAIN").await, None);
    assert_eq!(leased("LATER").await, None);
    assert!(
        world
            .store
            .sandbox_on_feed(&holder)
            .await
            .expect("a reading")
            .is_some()
    );
    world.store.withdraw(&holder).await.expect("withdrawn");
    assert_eq!(leased("A_KEY").await, None);
    assert_eq!(
        world.store.sandbox_on_feed(&holder).await.expect("a reading"),
        None
    );
}

#[tokio::test]
async fn names_are_unique_in_an_organisation_and_there_is_a_limit() {
    let world = world().await;
    let record = world.secret("A_KEY", None).await;
    let again = |org: &OrgId, name: &str| NewSecret {
        id: SecretId::random(),
        org_id: org.clone(),
        name: name.to_owned(),
        scope: "sandbox".to_owned(),
        egress: None,
        placeholder_prefix: String::new(),
        sealed: record.sealed.clone(),
        created_at: now(),
    };
    let taken = world
        .store
        .insert_secret(&again(&world.org, "A_KEY"), 9)
        .await
        .expect_err("taken");
    assert!(matches!(taken, StoreError::Conflict(Conflict::SecretExists)));
    let full = world
        .store
        .insert_secret(&again(&world.org, "B_KEY"), 1)
        .await
        .expect_err("full");
    assert!(matches!(
        full,
        StoreError::Conflict(Conflict::TooManySecrets { limit: 1 })
    ));
    assert_eq!(world.store.secrets(&world.org).await.expect("a list").len(), 1);
    let other = organization(&world.store, "second@example.org").await;
    world
        .store
        .insert_secret(&again(&other, "A_KEY"), 1)
        .await
        .expect("another's name");
}

#[tokio::test]
async fn nothing_of_a_value_is_in_the_file_and_another_key_is_noticed() {
    let world = world().await;
    world.secret("A_KEY", bound()).await;
    world.holder(1, SecretChoice::All).await;
    let other = Vault::new(&[8; 32]).expect("a vault");
    assert!(
        !world
            .store
            .has_secret_of_another_key(&vault().key_id())
            .await
            .expect("a reading")
    );
    assert!(
        world
            .store
            .has_secret_of_another_key(&other.key_id())
            .await
            .expect("a reading")
    );
    world.store.close().await;
    let mut looked = 0;
    for entry in std::fs::read_dir(world.directory.path()).expect("a listing") {
        let bytes = std::fs::read(entry.expect("an entry").path()).expect("a file");
        let found = bytes
            .windows(12)
            .any(|window| window == b"canary-value".as_slice());
        assert!(!found, "the value is in a file of the database");
        looked += bytes.len();
    }
    assert!(looked > 0);
}
