//! Bodies of the REST API, as published clients send and need them.
