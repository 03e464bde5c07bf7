/// What a block carries: its own address and generation, in every word, so that mixtures show.
package enum VerifyPattern {
  /// A word of the block: a hash of where it is and which generation it is of.
  private static func word(_ block: UInt64, _ generation: UInt64, _ index: UInt64, _ seed: UInt64) -> UInt64 {
    var value = (block &* 0x9E37_79B9_7F4A_7C15) ^ (generation &* 0xC2B2_AE3D_27D4_EB4F) ^ (index &* 0x1656_67B1_9E37_79F9) ^ seed
    value ^= value >> 30
    value &*= 0xBF58_476D_1CE4_E5B9
    value ^= value >> 27
    value &*= 0x94D0_49BB_1331_11EB
    return value ^ value >> 31
  }

  /// Address and generation in clear every 512 bytes, the rest hashed.
  package static func bytes(block: UInt64, generation: UInt64, byteCount: Int, seed: UInt64) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.reserveCapacity(byteCount)
    for index in 0..<UInt64(byteCount / 8) {
      let value = index % 64 == 0 ? block : index % 64 == 1 ? generation : word(block, generation, index, seed)
      for step in 0..<8 as Range<UInt64> { bytes.append(UInt8(truncatingIfNeeded: value >> (8 * step))) }
    }
    return bytes
  }

  package enum Finding: Equatable, Sendable {
    /// Whole, of this generation.
    case whole(generation: UInt64)
    /// Sectors of several generations or blocks, or none at all.
    case torn
    /// Whole, but another block's.
    case misplaced(block: UInt64)
  }

  package static func examine(_ bytes: [UInt8], block: UInt64, seed: UInt64) -> Finding {
    let found = bytes.number(at: 0, 8)
    let generation = bytes.number(at: 8, 8)
    guard bytes == Self.bytes(block: found, generation: generation, byteCount: bytes.count, seed: seed) else { return .torn }
    return found == block ? .whole(generation: generation) : .misplaced(block: found)
  }
}
