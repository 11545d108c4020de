//! Whose sandbox this is: somebody's from the start, or made in advance and taken once, before anything ran in it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use sandgate_api::agent::{AgentErrorCode, Claim};

use crate::wire::Refusal;

/// The sandbox's own environment, and whether it can still be given one.
#[derive(Debug, Default)]
pub(crate) struct Owner {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    /// Nothing was asked of it yet.
    #[default]
    Fresh,
    /// It was taken, or used as it was; the environment is final.
    Taken(BTreeMap<String, String>),
}

impl Owner {
    /// Takes the sandbox.
    pub(crate) fn claim(&self, claim: Claim) -> Result<(), Refusal> {
        for (name, value) in &claim.env {
            check(name, value)?;
        }
        let mut state = self.lock();
        match &*state {
            State::Fresh => {
                *state = State::Taken(claim.env);
                Ok(())
            }
            State::Taken(_) => Err(Refusal::new(
                AgentErrorCode::Invalid,
                "the sandbox was taken already",
            )),
        }
    }

    /// Nobody can take the sandbox any more.
    pub(crate) fn used(&self) {
        let mut state = self.lock();
        if matches!(*state, State::Fresh) {
            *state = State::Taken(BTreeMap::new());
        }
    }

    /// The sandbox's own environment, for a command: this is a use, too.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        self.used();
        match &*self.lock() {
            State::Taken(env) => env.clone(),
            State::Fresh => BTreeMap::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses what cannot be a variable of a program.
pub(crate) fn check(name: &str, value: &str) -> Result<(), Refusal> {
    if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
        let message = format!("`{}` is not an environment variable", name.escape_debug());
        return Err(Refusal::new(AgentErrorCode::Invalid, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(value: &str) -> Claim {
        Claim {
            env: BTreeMap::from([("A".to_owned(), value.to_owned())]),
        }
    }

    #[test]
    fn a_sandbox_is_taken_once_and_never_after_it_was_used() {
        let taken = Owner::default();
        assert!(taken.claim(claim("1")).is_ok());
        assert!(taken.claim(claim("2")).is_err());
        assert_eq!(taken.environment(), claim("1").env);
        let used = Owner::default();
        assert!(used.environment().is_empty());
        assert!(used.claim(claim("1")).is_err());
        assert!(used.environment().is_empty());
    }

    #[test]
    fn a_claim_that_is_refused_leaves_the_sandbox_as_it_was() {
        let owner = Owner::default();
        assert!(owner.claim(claim("a\0b")).is_err());
        assert!(owner.claim(claim("1")).is_ok());
    }
}
