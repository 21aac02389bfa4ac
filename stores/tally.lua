#!lua name=tally

-- The online store's writes. Each function runs atomically, so no client ever reads, changes and
-- writes back, and nothing needs a lock. The bytes are those of features/ledger.py and
-- features/profile.py; the numbers between at signs are put in when the library is loaded.

local RETENTION_MS = @RETENTION_MS@
local RECORDS_MAX = @LEDGER_RECORDS_MAX@
local RECORD = @RECORD_BYTES@
local HEADER = @HEADER_BYTES@
local VERSION = @LEDGER_VERSION@
local NEVER_DROPPED = '\0\0\0\0\0\0\0\128' -- the smallest int64
local TWO_32 = 4294967296

-- Event time of the record that starts at byte `at`: the upper 48 bits of its stamp.
local function time_at(s, at)
  local low, high = struct.unpack('<I4I2', s, at + 2)
  return low + high * TWO_32
end

-- Whether the record at `i` of `a` comes before (-1), is (0) or comes after (1) that at `j` of `b`.
local function compare(a, i, b, j)
  local ta, tb = time_at(a, i), time_at(b, j)
  if ta ~= tb then return ta < tb and -1 or 1 end
  local low_a, high_a = struct.unpack('<I4I4', a, i + 8)
  local low_b, high_b = struct.unpack('<I4I4', b, j + 8)
  if high_a ~= high_b then return high_a < high_b and -1 or 1 end
  if low_a ~= low_b then return low_a < low_b and -1 or 1 end
  return 0
end

-- Byte at which record number n (from 0) starts, in a body or behind a header.
local function start(n, header) return header + n * RECORD + 1 end

-- Merges two sorted runs; returns the body, and how many were added, known and contradicted.
local function merge(ledger, n, records, m)
  if n == 0 or compare(ledger, start(n - 1, HEADER), records, 1) < 0 then
    return string.sub(ledger, HEADER + 1) .. records, m, 0, 0
  end
  local low, high = 0, n -- the first known record that is not before the first new one
  while low < high do
    local middle = math.floor((low + high) / 2)
    if compare(ledger, start(middle, HEADER), records, 1) < 0 then
      low = middle + 1
    else
      high = middle
    end
  end
  local parts = { string.sub(ledger, HEADER + 1, HEADER + low * RECORD) }
  local added, known, contradicted = 0, 0, 0
  local i, j = low, 0
  while j < m do
    local at_i, at_j = start(i, HEADER), start(j, 0)
    local order = 1
    if i < n then order = compare(ledger, at_i, records, at_j) end
    if order < 0 then
      parts[#parts + 1] = string.sub(ledger, at_i, at_i + RECORD - 1)
      i = i + 1
    elseif order == 0 then
      if string.sub(ledger, at_i, at_i + RECORD - 1) == string.sub(records, at_j, at_j + RECORD - 1) then
        known = known + 1
      else
        contradicted = contradicted + 1
      end
      j = j + 1
    else
      parts[#parts + 1] = string.sub(records, at_j, at_j + RECORD - 1)
      added = added + 1
      j = j + 1
    end
  end
  parts[#parts + 1] = string.sub(ledger, start(i, HEADER))
  return table.concat(parts), added, known, contradicted
end

-- Applies retention; returns the body that stays and `dropped` as 8 bytes.
local function retain(body, dropped)
  local n = #body / RECORD
  local horizon = time_at(body, start(n - 1, 0)) - RETENTION_MS
  local low, high = 0, n -- the first record behind the horizon
  while low < high do
    local middle = math.floor((low + high) / 2)
    if time_at(body, start(middle, 0)) <= horizon then
      low = middle + 1
    else
      high = middle
    end
  end
  local first = math.max(low, n - RECORDS_MAX)
  if first == 0 then return body, dropped end
  local time = time_at(body, start(first - 1, 0))
  local low32, high32 = struct.unpack('<I4I4', dropped)
  if dropped == NEVER_DROPPED or time > low32 + high32 * TWO_32 then
    dropped = struct.pack('<I4I4', time % TWO_32, math.floor(time / TWO_32))
  end
  return string.sub(body, start(first, 0)), dropped
end

-- FCALL tally_append 1 <ledger key> <records> [return]
--
-- Adds records, sorted and each once, to a card's ledger: in order, known ones dropped, then
-- retention. With `return`, gives the ledger back as it was before retention, so that the past of
-- every new record is in it; otherwise {added, known, contradicted}.
local function append(keys, args)
  local records = args[1]
  if #records == 0 or #records % RECORD ~= 0 then
    return redis.error_reply('ERR tally_append: the records are not whole')
  end
  local ledger = redis.call('GET', keys[1])
  local dropped = NEVER_DROPPED
  if ledger then
    if string.byte(ledger, 1) ~= VERSION or string.byte(ledger, 2) ~= RECORD then
      return redis.error_reply('ERR tally_append: the ledger is of another version')
    end
    dropped = string.sub(ledger, 9, 16)
  end
  local n = ledger and (#ledger - HEADER) / RECORD or 0
  local body, added, known, contradicted = merge(ledger or '', n, records, #records / RECORD)
  local whole = ledger
  if added > 0 then
    local header = string.char(VERSION, RECORD, 0, 0, 0, 0, 0, 0)
    whole = header .. dropped .. body
    body, dropped = retain(body, dropped)
    local kept = header .. dropped .. body
    if kept ~= ledger then redis.call('SET', keys[1], kept) end
  end
  if args[2] == 'return' then return whole end
  return { added, known, contradicted }
end

local PROFILE_RECORD = @PROFILE_RECORD_BYTES@
local PROFILE_RECORDS_MAX = @PROFILE_RECORDS_MAX@
local PROFILE_VERSION = @PROFILE_VERSION@
local PROFILE_HEADER_BYTES = 8

-- Bytewise, since Lua's own comparison of strings follows the server's locale.
local function bytes_before(a, b)
  for i = 1, #a do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return false
end

-- FCALL tally_profile 1 <profile key> <records>
--
-- Adds records to a card's profile: each content once, from its earliest instant, in order of it.
local function profile(keys, args)
  local known = redis.call('GET', keys[1])
  local all = (known and string.sub(known, PROFILE_HEADER_BYTES + 1) or '') .. args[1]
  local first = {}
  for at = 1, #all, PROFILE_RECORD do
    local low, high = struct.unpack('<I4I4', all, at)
    local content = string.sub(all, at + 8, at + PROFILE_RECORD - 1)
    local valid_from = low + high * TWO_32
    if not first[content] or valid_from < first[content] then first[content] = valid_from end
  end
  local contents = {}
  for content in pairs(first) do contents[#contents + 1] = content end
  table.sort(contents, function(a, b)
    if first[a] ~= first[b] then return first[a] < first[b] end
    return bytes_before(a, b)
  end)
  local parts = { string.char(PROFILE_VERSION, PROFILE_RECORD, 0, 0, 0, 0, 0, 0) }
  for i = math.max(1, #contents - PROFILE_RECORDS_MAX + 1), #contents do
    local valid_from = first[contents[i]]
    parts[#parts + 1] = struct.pack('<I4I4', valid_from % TWO_32, math.floor(valid_from / TWO_32))
    parts[#parts + 1] = contents[i]
  end
  redis.call('SET', keys[1], table.concat(parts))
  return #parts
end

local LOST = 'ERR the online store has lost its data; the next load or start rebuilds it'

-- Whether the store says anything of itself. Where it does not, it has lost its data or is being
-- rebuilt, and nothing may make it speak but the rebuild's end.
local function is_lost(keys)
  return redis.call('HEXISTS', keys[1], 'card_key') == 0 or redis.call('EXISTS', keys[3]) == 0
end

-- The progress value that every read takes along: "<card key fingerprint> <complete through>
-- <format>", complete through -1 while a load is unfinished. Where there is a stream, it says
-- through which instant all that was published is applied, however new what was loaded is.
local function publish(keys)
  local state =
    redis.call('HMGET', keys[1], 'card_key', 'complete_through_ms', 'format', 'stream_through_ms')
  local through = redis.call('HLEN', keys[2]) == 0 and (state[4] or state[2]) or '-1'
  redis.call('SET', keys[3], state[1] .. ' ' .. (through or '-1') .. ' ' .. state[3])
  return redis.status_reply('OK')
end

-- Raises a field of the state to an instant.
local function raise(keys, field, instant)
  if tonumber(instant) > tonumber(redis.call('HGET', keys[1], field) or '-1') then
    redis.call('HSET', keys[1], field, instant)
  end
end

-- FCALL tally_begin_load 3 <meta> <loads> <progress> <load id> <description>
local function begin_load(keys, args)
  if is_lost(keys) then return redis.error_reply(LOST) end
  redis.call('HSET', keys[2], args[1], args[2])
  return publish(keys)
end

-- FCALL tally_end_load 3 <meta> <loads> <progress> <load id> <newest event time, ms>
local function end_load(keys, args)
  if is_lost(keys) then return redis.error_reply(LOST) end
  redis.call('HDEL', keys[2], args[1])
  raise(keys, 'complete_through_ms', args[2])
  return publish(keys)
end

-- FCALL tally_stream_through 3 <meta> <loads> <progress> <instant, ms> <latest that can be, ms>
--
-- What was said of a later instant than can be came from a clock that was ahead: it is taken back.
local function stream_through(keys, args)
  if is_lost(keys) then return redis.error_reply(LOST) end
  local said = tonumber(redis.call('HGET', keys[1], 'stream_through_ms') or '-1')
  if said > tonumber(args[2]) then redis.call('HSET', keys[1], 'stream_through_ms', '-1') end
  raise(keys, 'stream_through_ms', args[1])
  return publish(keys)
end

-- FCALL tally_swap 1 <key> <SHA-1 of what it holds, in hex, or nothing> <value, or nothing>
--
-- Sets a value, or takes it away, where the key holds what was read; 1 if so, else 0.
local function swap(keys, args)
  local held = redis.call('GET', keys[1])
  if (held and redis.sha1hex(held) or '') ~= args[1] then return 0 end
  if args[2] == '' then redis.call('DEL', keys[1]) else redis.call('SET', keys[1], args[2]) end
  return 1
end

redis.register_function('tally_append', append)
redis.register_function('tally_swap', swap)
redis.register_function('tally_profile', profile)
redis.register_function('tally_begin_load', begin_load)
redis.register_function('tally_end_load', end_load)
redis.register_function('tally_stream_through', stream_through)
