"""Scripts."""

from __future__ import annotations

from typing import Any

REGISTER = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('SETNX', KEYS[3], ARGV[2])
return 1
"""


# The owner comes first in ARGV, empty for anybody; whoever is refused reads the run to learn why.
IS_OWNER = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local owner = table.concat(redis.call('HMGET', KEYS[1], 'host', 'pid', 'pid_started'), ' ')
if ARGV[1] ~= '' and ARGV[1] ~= owner then return 0 end
"""


UPDATE = f"""{IS_OWNER}
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return 1
"""


APPEND = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local counter, history, token, unsure = unpack(ARGV)
if unsure == '1' then
    for _, entry in ipairs(redis.call('XREVRANGE', KEYS[2], '+', '-')) do
        if entry[2][2] == token then return 1 end
    end
end
local id = redis.call('HINCRBY', KEYS[1], counter, 1)
redis.call('XADD', KEYS[2], 'MAXLEN', '=', history, id .. '-0', 'token', token, unpack(ARGV, 5))
return 1
"""


ACKNOWLEDGE = f"""{IS_OWNER}
if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 1 then return 1 end
if redis.call('HDEL', KEYS[2], ARGV[2]) == 0 then return 0 end
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
return 1
"""


SEND = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if table.concat(redis.call('HMGET', KEYS[1], 'state', 'host', 'pid', 'pid_started'), ' ') ~= ARGV[1] then return 0 end
local id = redis.call('HINCRBY', KEYS[1], 'commands', 1)
redis.call('HSET', KEYS[2], id, ARGV[3])
redis.call('HDEL', KEYS[2], id - ARGV[2])
redis.call('HDEL', KEYS[3], id - ARGV[2])
return id
"""


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
