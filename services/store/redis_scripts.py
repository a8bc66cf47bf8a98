"""Lua scripts of the Redis run store. Each script is one atomic change; it returns 0 if it has changed nothing.

KEYS[1] is always the hash of the run. `redis` describes all keys.
"""

from __future__ import annotations

from typing import Any

# KEYS: run, names of all runs, schema version. ARGV: name, schema version, fields and values of the run.
REGISTER = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('SETNX', KEYS[3], ARGV[2])
return 1
"""

# The beginning of a script whose ARGV[1] is the expected owner, empty for any. If the script returns 0, the caller
# reads the run to find out why.
_CHECK_OWNER = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local owner = table.concat(redis.call('HMGET', KEYS[1], 'host', 'pid', 'pid_started'), ' ')
if ARGV[1] ~= '' and ARGV[1] ~= owner then return 0 end
"""

# ARGV: owner, fields and values.
UPDATE = f"""{_CHECK_OWNER}
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return 1
"""

# KEYS: run, stream. ARGV: field of the last id, length of the history, token, "1" to look the token up before, values.
APPEND = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local counter, history, token, unconfirmed = unpack(ARGV)
if unconfirmed == '1' then
    for _, entry in ipairs(redis.call('XREVRANGE', KEYS[2], '+', '-')) do
        if entry[2][2] == token then return 1 end
    end
end
local id = redis.call('HINCRBY', KEYS[1], counter, 1)
redis.call('XADD', KEYS[2], 'MAXLEN', '=', history, id .. '-0', 'token', token, unpack(ARGV, 5))
return 1
"""

# KEYS: run, commands, answers. ARGV: owner, id, answer.
ACKNOWLEDGE = f"""{_CHECK_OWNER}
if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 1 then return 1 end
if redis.call('HDEL', KEYS[2], ARGV[2]) == 0 then return 0 end
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
return 1
"""

# KEYS: run, commands, answers. ARGV: state and owner that the caller has read, length of the history, command.
SEND = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if table.concat(redis.call('HMGET', KEYS[1], 'state', 'host', 'pid', 'pid_started'), ' ') ~= ARGV[1] then return 0 end
local id = redis.call('HINCRBY', KEYS[1], 'commands', 1)
redis.call('HSET', KEYS[2], id, ARGV[3])
redis.call('HDEL', KEYS[2], id - ARGV[2])
redis.call('HDEL', KEYS[3], id - ARGV[2])
return id
"""

# KEYS: run, commands, answers. ARGV: state, owner, and heartbeat that the caller has read; answer to the unread
# commands; fields and values.
ADOPT = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local now = table.concat(redis.call('HMGET', KEYS[1], 'state', 'host', 'pid', 'pid_started', 'heartbeat'), ' ')
if now ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('HDEL', KEYS[1], 'stopped_because')
for _, id in ipairs(redis.call('HKEYS', KEYS[2])) do redis.call('HSET', KEYS[3], id, ARGV[2]) end
redis.call('DEL', KEYS[2])
return 1
"""


def run_script(client: Any, script: str, keys: tuple[str, ...], *arguments: object) -> Any:
    """Run a Lua script and return its result."""
    return client.eval(script, len(keys), *keys, *arguments)
