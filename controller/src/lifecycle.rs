//! The life of a sandbox, as a pure function: state and event in, state and next effect out.
//!
//! ```text
//! Preparing -> Announcing -> Enforcing -> Launching -> Greeting -> Furnishing -> Recording -> Running
//!     |            |             |            |            |           |            |           |
//!     |            |             |            |  Admitting ----------> +            |           |
//!     |            |             |            |      |     |           |            |           |
//!     +------------+-------------+--- any failure or end --+-----------+------------+-----------+
//!                                        v
//!                     Withdrawing -> Destroying -> Closing -> Ended
//! ```
//!
//! A sandbox of the warm pool goes the same way before anybody asks for it, under rules that allow nothing. The
//! one that somebody takes begins a second life at Admitting: launched already, and not usable before the node has
//! acknowledged its owner's rules.
//!
//! Invariants, checked below over every reachable state: nothing is launched before the node has
//! acknowledged the policy; whatever was begun is withdrawn from the feed (so that the node forgets the
//! address) and then destroyed (so that the address can be leased again), in this order; what cannot be
//! interrupted half-way (making and launching) is awaited before it is taken away.

use sandgate_api::rest::SandboxStatus;

/// Where a sandbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// On its way up.
    Creating {
        /// How far.
        phase: Phase,
        /// It is to end as soon as the phase lets it.
        doomed: Option<Cause>,
    },
    /// Usable.
    Running,
    /// On its way down.
    Ending {
        /// How far.
        phase: Closing,
        /// Why.
        cause: Cause,
        /// How often the phase has failed.
        failures: u32,
    },
    /// Gone.
    Ended(Cause),
}

/// Steps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The backend makes the point of attachment.
    Preparing,
    /// It is put on the feed.
    Announcing,
    /// The node has not acknowledged it yet.
    Enforcing,
    /// The backend starts it.
    Launching,
    /// The agent has not answered yet.
    Greeting,
    /// It was made in advance: the node has not acknowledged its owner's rules, or the agent not its owner.
    Admitting,
    /// What it was made from has files to be written and commands to be run.
    Furnishing,
    /// It is recorded as running.
    Recording,
}

/// Steps down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Closing {
    /// It is taken off the feed, and the node is given time to say so.
    Withdrawing,
    /// The backend takes it away.
    Destroying,
    /// Its end is recorded.
    Recording,
}

/// Why a sandbox ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Somebody asked for it.
    Stopped,
    /// Its lifetime is over.
    Expired,
    /// Nothing happened in it for as long as its owner allows.
    Idle,
    /// Its first process ended.
    Died,
    /// It was there before a restart and is not any more.
    Lost,
    /// A step of its creation failed.
    Failed,
    /// Whoever asked for it went away before it was there.
    Abandoned,
    /// The controller ended while it was being made.
    Interrupted,
    /// Nobody took it from the pool: it grew old, or others need its place.
    Retired,
}

impl Cause {
    /// The status it leaves behind.
    pub fn status(self) -> SandboxStatus {
        match self {
            Self::Stopped
            | Self::Expired
            | Self::Idle
            | Self::Died
            | Self::Lost
            | Self::Abandoned
            | Self::Retired => SandboxStatus::Terminated,
            Self::Failed | Self::Interrupted => SandboxStatus::Error,
        }
    }

    /// For people.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Stopped => "stopped on request",
            Self::Expired => "its lifetime was over",
            Self::Idle => "nothing happened in it for its idle timeout",
            Self::Died => "its first process ended",
            Self::Lost => "it was gone when the controller came back",
            Self::Failed => "it could not be created",
            Self::Abandoned => "the client went away before it was created",
            Self::Interrupted => "the controller ended while it was being created",
            Self::Retired => "nobody took it from the pool",
        }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The present effect succeeded.
    Done,
    /// The present effect failed.
    Failed,
    /// It is to end.
    End(Cause),
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Have the backend make the point of attachment.
    Prepare,
    /// Commit it to the feed.
    Announce,
    /// Wait for the node's acknowledgement.
    AwaitEnforced,
    /// Have the backend start it.
    Launch,
    /// Wait for the agent's answer.
    Greet,
    /// Wait for the node's acknowledgement, and give the agent what is its owner's.
    Admit,
    /// Write its template's files and run its commands.
    Furnish,
    /// Commit that it runs.
    RecordRunning,
    /// Wait for its expiry or death.
    Watch,
    /// Take it off the feed and give the node time to follow.
    Withdraw {
        /// How often it has failed.
        failures: u32,
    },
    /// Have the backend take everything away.
    Destroy {
        /// How often it has failed.
        failures: u32,
    },
    /// Commit that it has ended.
    RecordEnd {
        /// Why.
        cause: Cause,
        /// How often it has failed.
        failures: u32,
    },
}

/// What follows an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Next {
    /// The present effect goes on.
    Continue,
    /// The present effect is over, or given up; this one begins.
    Begin(Effect),
    /// Nothing is left to do.
    Rest,
}

impl State {
    /// A new sandbox, stored as `creating`.
    pub const NEW: Self = Self::Creating {
        phase: Phase::Preparing,
        doomed: None,
    };

    /// One that somebody has just taken from the pool, stored as `creating`.
    pub const CLAIMED: Self = Self::Creating {
        phase: Phase::Admitting,
        doomed: None,
    };

    /// One of the pool that an earlier controller made: it runs, if it answers.
    pub const ADOPTED: Self = Self::Creating {
        phase: Phase::Greeting,
        doomed: None,
    };

    /// One that is to end.
    pub fn ending(cause: Cause) -> Self {
        Self::Ending {
            phase: Closing::Withdrawing,
            cause,
            failures: 0,
        }
    }

    /// What is to be done in this state, when nothing is under way.
    pub fn effect(self) -> Option<Effect> {
        match self {
            Self::Creating { phase, doomed: _ } => Some(match phase {
                Phase::Preparing => Effect::Prepare,
                Phase::Announcing => Effect::Announce,
                Phase::Enforcing => Effect::AwaitEnforced,
                Phase::Launching => Effect::Launch,
                Phase::Greeting => Effect::Greet,
                Phase::Admitting => Effect::Admit,
                Phase::Furnishing => Effect::Furnish,
                Phase::Recording => Effect::RecordRunning,
            }),
            Self::Running => Some(Effect::Watch),
            Self::Ending {
                phase,
                cause,
                failures,
            } => Some(match phase {
                Closing::Withdrawing => Effect::Withdraw { failures },
                Closing::Destroying => Effect::Destroy { failures },
                Closing::Recording => Effect::RecordEnd { cause, failures },
            }),
            Self::Ended(_) => None,
        }
    }
}

/// The life of a sandbox, one event further.
pub fn step(state: State, event: Event) -> (State, Next) {
    let state = match state {
        State::Creating { phase, doomed } => match event {
            Event::End(cause) if interruptible(phase) => State::ending(cause),
            Event::End(cause) => {
                let doomed = Some(doomed.unwrap_or(cause));
                return (State::Creating { phase, doomed }, Next::Continue);
            }
            Event::Failed => State::ending(doomed.unwrap_or(Cause::Failed)),
            Event::Done => match doomed {
                Some(cause) => State::ending(cause),
                None => after(phase),
            },
        },
        State::Running => match event {
            Event::End(cause) => State::ending(cause),
            // Watching ends only with the sandbox.
            Event::Done | Event::Failed => State::ending(Cause::Died),
        },
        State::Ending {
            phase,
            cause,
            failures,
        } => match event {
            Event::End(_) => return (state, Next::Continue),
            Event::Failed => State::Ending {
                phase,
                cause,
                failures: failures.saturating_add(1),
            },
            Event::Done => match phase {
                Closing::Withdrawing => State::Ending {
                    phase: Closing::Destroying,
                    cause,
                    failures: 0,
                },
                Closing::Destroying => State::Ending {
                    phase: Closing::Recording,
                    cause,
                    failures: 0,
                },
                Closing::Recording => State::Ended(cause),
            },
        },
        State::Ended(_) => state,
    };
    (state, state.effect().map_or(Next::Rest, Next::Begin))
}

/// Waiting can be given up at any time; making something cannot.
fn interruptible(phase: Phase) -> bool {
    match phase {
        Phase::Enforcing | Phase::Greeting | Phase::Admitting | Phase::Furnishing => true,
        Phase::Preparing | Phase::Announcing | Phase::Launching | Phase::Recording => false,
    }
}

fn after(phase: Phase) -> State {
    let phase = match phase {
        Phase::Preparing => Phase::Announcing,
        Phase::Announcing => Phase::Enforcing,
        Phase::Enforcing => Phase::Launching,
        Phase::Launching => Phase::Greeting,
        Phase::Greeting | Phase::Admitting => Phase::Furnishing,
        Phase::Furnishing => Phase::Recording,
        Phase::Recording => return State::Running,
    };
    State::Creating { phase, doomed: None }
}

#[cfg(test)]
mod tests;
