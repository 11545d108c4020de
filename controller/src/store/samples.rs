//! What tests put into a store when it does not matter what it is.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    feed::Endpoint,
    id::{ApiKeyId, OrgId, SandboxId, UserId},
    rest::Isolation,
};
use sandgate_policy::Policy;

use super::{NewAccount, NewKey, NewSandbox, SecretChoice, Store};
use crate::{
    spec::{SandboxSpec, Size},
    terms::Terms,
};

/// A store of its own, in a directory that it needs.
pub(crate) async fn store() -> (Store, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(&directory.path().join("test.db"))
        .await
        .expect("a store");
    (store, directory)
}

/// An organisation that has registered.
pub(crate) async fn organization(store: &Store, email: &str) -> OrgId {
    let org_id = OrgId::random();
    store
        .register(&account(email), "acme", &key(&org_id), None, now())
        .await
        .expect("registered");
    org_id
}

/// Somebody who registers.
pub(crate) fn account(email: &str) -> NewAccount {
    NewAccount {
        email: email.to_owned(),
        organization: "Acme".to_owned(),
        first_name: None,
        last_name: None,
        use_case: None,
    }
}

/// The first key of an organisation.
pub(crate) fn key(org_id: &OrgId) -> NewKey {
    NewKey {
        id: ApiKeyId::random(),
        org_id: org_id.clone(),
        user_id: UserId::random(),
        name: "default".to_owned(),
        prefix: "sk_sandbox_x".to_owned(),
        hash: [7; 32],
        scopes: vec!["*".to_owned()],
        expires_at: None,
    }
}

/// The time, to the millisecond, as stored.
pub(crate) fn now() -> Timestamp {
    Timestamp::from_millisecond(Timestamp::now().as_millisecond()).expect("now")
}

/// A sandbox that lives for a minute.
pub(crate) fn sandbox(org_id: &OrgId, policy: Option<Policy>) -> NewSandbox {
    let spec = SandboxSpec {
        cpus: "500m".parse().expect("cpus"),
        memory: Size::memory("512Mi").expect("memory"),
        disk: Size::disk("1Gi").expect("disk"),
        pids: 64,
        timeout_seconds: 60,
        env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
        isolation: Isolation::Container,
    };
    let created_at = now();
    NewSandbox {
        id: SandboxId::random(),
        org_id: org_id.clone(),
        spec,
        policy,
        secrets: SecretChoice::None,
        authority: None,
        terms: Terms::default(),
        created_at,
        expires_at: created_at + SignedDuration::from_secs(60),
    }
}

/// Where the sandbox with this number is attached.
pub(crate) fn endpoint(last: u8) -> Endpoint {
    Endpoint {
        ifindex: u32::from(last),
        interface: format!("sg{last}"),
        address: std::net::Ipv4Addr::new(10, 213, 0, last),
        address6: None,
        mac: [2, 83, 71, 1, 0, last],
        agent_port: 9111,
    }
}
