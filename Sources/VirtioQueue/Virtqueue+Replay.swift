import CLinux
import VirtioSpec

/// Chains that a process took which was killed before it answered them.
extension Virtqueue {
  /// A chain that was begun again this often and never answered is not begun once more: whoever begins it seems to die of it.
  public static var replayLimit: Int { 3 }

  /// Chains still to be taken again; they come before new ones, in the order in which they were first taken.
  public var replayCount: Int { replays.count - replayPosition }

  @usableFromInline @inline(never)
  mutating func nextReplay(_ chain: inout DescriptorChain) -> ChainOutcome {
    var replay = replays[replayPosition]
    if replayPosition >= replayMark {
      // Said before it is begun. A chain that was given back meanwhile is not counted twice.
      replayMark = replayPosition + 1
      replay.count = replay.count == .max ? .max : replay.count + 1
      replays[replayPosition] = replay
      recorder?.countReplay(entry: replay.entry, replay.count)
    }
    guard mark(replay.head, entryCount: replay.entryCount) else { return breakRing(.headInFlight) }
    let rules = WalkRules(size: size, hasIndirect: hasIndirect)
    let walked =
      isPacked
      ? walkRecorded(replay, rules, chain.builder())
      : unsafe Self.walkSplit(replay.head, descriptors, rules, storedMemory, chain.builder())
    if let reason = walked.broken { return breakRing(reason) }
    chain.finish(walked, ChainToken(head: replay.head, entryCount: replay.entryCount))
    chain.storedIsPoisoned = Int(replay.count) > Self.replayLimit
    replayPosition += 1
    hasReplays = replayPosition < replays.count
    isReplayed[Int(replay.head)] = true
    replayedCount += 1
    return .chain
  }

  /// A packed list from the copies in the record: what the guest wrote, and as little trusted as that.
  private func walkRecorded(_ replay: InflightRecovery.Replay, _ rules: WalkRules, _ start: ChainBuilder) -> ChainBuilder {
    var builder = start
    guard let recorder else { return builder.breaking(.next) }
    var here = replay.entry
    for step in 0..<replay.entryCount {
      let entry = InflightLayout.Packed.entry(Int(here))
      let address = recorder.region.load64(entry + InflightLayout.Packed.address)
      let word = recorder.region.load64(entry + InflightLayout.Packed.idFlagsLength)
      let flags = UInt16(truncatingIfNeeded: word >> 16)
      let length = UInt32(truncatingIfNeeded: word >> 32)
      if flags & PackedRing.indirect != 0 {
        guard step == 0, replay.entryCount == 1 else { return builder.breaking(.indirectNesting) }
        builder = Self.walkPackedTable(address, length, rules, storedMemory, builder)
      } else {
        builder.append(address, length, isWritable: flags & PackedRing.write != 0, storedMemory)
      }
      guard builder.broken == nil else { return builder }
      // SAFETY: the links are our own copy, and were checked to lead through `entryCount` entries.
      if step + 1 < replay.entryCount { here = unsafe recorder.next[Int(here)] }
    }
    return builder
  }

  /// True if the chain was a replayed one and waits for its next turn now; it stays in flight for the record.
  @usableFromInline @inline(never)
  mutating func giveBackReplay(_ token: ChainToken) -> Bool {
    guard isReplayed[Int(token.head)], replayPosition > 0, replays[replayPosition - 1].head == token.head else { return false }
    isReplayed[Int(token.head)] = false
    replayedCount -= 1
    replayPosition -= 1
    hasReplays = true
    return true
  }

  /// For tests: the process is killed after so many more stores into record and ring index.
  package mutating func die(afterStores count: Int) { recorder?.storesLeft = count }
  /// Whether it has been killed so.
  package var isDead: Bool { recorder?.storesLeft == 0 }
}
